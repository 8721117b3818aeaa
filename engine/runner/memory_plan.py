"""What an engine would take of a device, found out without loading or allocating anything."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.attention import select_backend
from engine.attention.backend import AttentionBackend
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.model_config import read_model_config
from engine.model_source import resolve_model
from engine.models.registry import build_model
from engine.parallel.group import TensorGroup
from engine.parallel.share import share_of
from engine.runner.build import choose_device, choose_dtype
from engine.runner.kv_memory import CacheLayout, blocks_of_sequence, cache_bytes, fit_blocks


@dataclass(slots=True, frozen=True)
class MemoryPlan:
    """Memory of an engine by its own figures; of one rank, if several share the model.

    On a GPU the cache is the most that it can be: the activations of the largest step and what the
    CUDA runtime takes are only known once they are there.
    """

    device: str
    """`cpu` or `cuda`."""
    dtype: str
    weight_bytes: int
    max_model_len: int
    """Tokens of the longest sequence."""
    block_size: int
    """Tokens in a block."""
    cache_bytes: int
    num_blocks: int
    """The null block, which holds no tokens, included."""
    num_full_sequences: int
    """Sequences of `max_model_len` tokens that the cache holds at once."""


def plan_memory(config: EngineConfig, gpu_bytes: int | None = None) -> MemoryPlan:
    """Plan the memory of an engine.

    Args:
        config: of the engine.
        gpu_bytes: memory of the GPU that it would run on, unless `device` is `cpu`; None looks at
            this machine.

    Raises:
        ConfigError: the model is not there, an option does not fit it, or the cache would not hold
            one sequence.
    """
    shape = read_model_config(resolve_model(config.model))
    device = _device(config, gpu_bytes)
    dtype = choose_dtype(config, shape, device)
    max_model_len = config.resolve_max_model_len(shape.max_position_embeddings)
    rank = TensorGroup(0, config.tensor_parallel_size)
    slots = build_model(shape, dtype, torch.device("meta"), max_model_len, rank).slots()
    weight_bytes = sum(slot.numel() * slot.element_size() for slot in slots.values())
    memory = None
    if device.type == "cuda":
        total = gpu_bytes or torch.cuda.mem_get_info(device)[1]
        memory = (total - weight_bytes, total)
    backend = _backend(config, device, dtype, shape.head_dim)
    layout = CacheLayout.of(config, share_of(shape, rank.size), backend, dtype)
    num_blocks = fit_blocks(config, layout, cache_bytes(config, memory), max_model_len)
    return MemoryPlan(
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        weight_bytes=weight_bytes,
        max_model_len=max_model_len,
        block_size=layout.block_size,
        cache_bytes=num_blocks * layout.block_bytes,
        num_blocks=num_blocks,
        num_full_sequences=(num_blocks - 1) // blocks_of_sequence(layout, max_model_len),
    )


def _device(config: EngineConfig, gpu_bytes: int | None) -> torch.device:
    if gpu_bytes is not None and config.device != "cpu":
        return torch.device("cuda")
    return choose_device(config)


def _backend(
    config: EngineConfig, device: torch.device, dtype: torch.dtype, head_dim: int
) -> AttentionBackend:
    """The backend that the engine would take; for a GPU that is not here, by its name alone."""
    name = config.attention_backend
    if name == "flash_attn" and not torch.cuda.is_available():
        raise ConfigError(
            "attention_backend 'flash_attn' can only be planned on a machine with a GPU; set it to "
            "'auto' to see about the rest."
        )
    try:
        return select_backend(name, device, dtype, head_dim, config.kvcache_block_size)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"to plan for a GPU, the package {error.name} must be installed."
        ) from error
