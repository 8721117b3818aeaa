"""How many blocks the KV cache gets, and its tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from engine.attention.backend import AttentionBackend
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.model_config import ModelConfig

DEFAULT_CPU_CACHE_BYTES = 2 * 2**30
RESERVE_BYTES = 512 * 2**20
"""Left free for what comes after the cache is allocated: CUDA graphs (their nodes, and what the
largest of them computes), and log-probabilities of prompt tokens when somebody asks for them
(`engine.sampling.logprobs` bounds what they take)."""


@dataclass(slots=True, frozen=True)
class CacheLayout:
    """Shape of the paged cache, before its size is known."""

    backend: AttentionBackend
    block_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(
        cls, config: EngineConfig, shape: ModelConfig, backend: AttentionBackend, dtype: torch.dtype
    ) -> CacheLayout:
        """The layout that a model has under a backend."""
        size = config.kvcache_block_size or backend.block_size
        return cls(backend, size, shape.num_layers, shape.num_kv_heads, shape.head_dim, dtype)

    def shape(self, num_blocks: int) -> tuple[int, ...]:
        """Of one layer."""
        return self.backend.kv_cache_shape(
            num_blocks, self.block_size, self.num_kv_heads, self.head_dim
        )

    @property
    def block_bytes(self) -> int:
        """Bytes of a block, over all layers."""
        return math.prod(self.shape(1)) * self.dtype.itemsize * self.num_layers

    def allocate(self, num_blocks: int, device: torch.device) -> list[torch.Tensor]:
        """Zeros, one tensor a layer. Padding must be finite: attention multiplies it by 0."""
        shape = (self.num_layers, *self.shape(num_blocks))
        return list(_zeros(shape, self.dtype, device))


def count_blocks(
    config: EngineConfig, layout: CacheLayout, device: torch.device, max_model_len: int
) -> int:
    """Blocks that the configuration allows, the null block included.

    On a GPU whatever else the engine needs must be allocated already, activations of its largest
    step included.

    Raises:
        ConfigError: they hold less than one sequence of `max_model_len` tokens.
    """
    memory = None if device.type == "cpu" else torch.cuda.mem_get_info(device)
    return fit_blocks(config, layout, cache_bytes(config, memory), max_model_len)


def fit_blocks(
    config: EngineConfig, layout: CacheLayout, allowed_bytes: int, max_model_len: int
) -> int:
    """Blocks in so many bytes, or as many as the configuration says; the null block included.

    Raises:
        ConfigError: they hold less than one sequence of `max_model_len` tokens.
    """
    num_blocks = config.num_kvcache_blocks
    if num_blocks == -1:
        num_blocks = allowed_bytes // layout.block_bytes
    if num_blocks <= blocks_of_sequence(layout, max_model_len):  # one more: the null block
        raise ConfigError(
            f"the KV cache has room for {max(num_blocks - 1, 0) * layout.block_size} tokens, less "
            f"than one sequence of max_model_len = {max_model_len}; lower max_model_len or raise "
            "kv_cache_memory_bytes, gpu_memory_utilization or num_kvcache_blocks."
        )
    return num_blocks


def blocks_of_sequence(layout: CacheLayout, num_tokens: int) -> int:
    """Blocks that a sequence of so many tokens takes."""
    return math.ceil(num_tokens / layout.block_size)


def cache_bytes(config: EngineConfig, gpu_memory: tuple[int, int] | None) -> int:
    """Bytes that the KV cache may take.

    Args:
        config: of the engine.
        gpu_memory: bytes that are free, and bytes in all; None on a CPU.
    """
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    if gpu_memory is None:
        return DEFAULT_CPU_CACHE_BYTES
    free, total = gpu_memory
    return max(0, int(total * config.gpu_memory_utilization) - (total - free) - RESERVE_BYTES)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on CPU the system hands out their pages when they are first written, not now."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    raw = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)
