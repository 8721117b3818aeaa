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


@dataclass(slots=True)
class KVCache:
    """The paged cache: one tensor a layer, shaped as the attention backend wants it."""

    layers: list[torch.Tensor]
    num_blocks: int
    """Blocks in each layer, the null block included."""
    block_size: int


def allocate_kv_cache(
    config: EngineConfig,
    shape: ModelConfig,
    backend: AttentionBackend,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
    step_tokens: int,
) -> KVCache:
    """Size the cache by what the configuration allows and allocate it.

    Raises:
        ConfigError: the memory allowed holds less than one sequence of `max_model_len` tokens, or
            the allocation fails.
    """
    block_size = config.kvcache_block_size or backend.block_size
    layer_shape = backend.kv_cache_shape(1, block_size, shape.num_kv_heads, shape.head_dim)
    block_bytes = math.prod(layer_shape) * dtype.itemsize * shape.num_layers
    num_blocks = config.num_kvcache_blocks
    if num_blocks == -1:
        num_blocks = _cache_bytes(config, shape, dtype, device, step_tokens) // block_bytes
    needed = math.ceil(max_model_len / block_size) + 1  # one more: the null block
    if num_blocks < needed:
        raise ConfigError(
            f"the KV cache has room for {max(num_blocks - 1, 0) * block_size} tokens, less than "
            f"one sequence of max_model_len = {max_model_len}; lower max_model_len or raise "
            "kv_cache_memory_bytes, gpu_memory_utilization or num_kvcache_blocks."
        )
    full = backend.kv_cache_shape(num_blocks, block_size, shape.num_kv_heads, shape.head_dim)
    try:
        layers = [_zeros(full, dtype, device) for _ in range(shape.num_layers)]
    except RuntimeError as error:
        raise ConfigError(
            f"no memory for a KV cache of {num_blocks * block_bytes / 2**30:.1f} GiB; lower "
            "kv_cache_memory_bytes, num_kvcache_blocks or gpu_memory_utilization."
        ) from error
    return KVCache(layers, num_blocks, block_size)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on CPU the system hands out their pages when they are first written, not now.

    Padding must be finite: attention multiplies it by a weight of 0.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    raw = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)


def _cache_bytes(
    config: EngineConfig,
    shape: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    step_tokens: int,
) -> int:
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    if device.type == "cpu":
        return DEFAULT_CPU_CACHE_BYTES
    free, total = torch.cuda.mem_get_info(device)
    allowed = int(total * config.gpu_memory_utilization) - (total - free)
    return max(0, allowed - _workspace_bytes(config, shape, dtype, step_tokens))


def _workspace_bytes(
    config: EngineConfig, shape: ModelConfig, dtype: torch.dtype, step_tokens: int
) -> int:
    """Activations and logits of the largest step, counted from the shapes that live at once."""
    per_token = 4 * shape.hidden_size + 3 * shape.intermediate_size
    activations = step_tokens * per_token * dtype.itemsize
    logits = config.max_num_seqs * shape.vocab_size * 4
    return activations + 4 * logits
