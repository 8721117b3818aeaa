"""Attention backends, and the choice among them."""

from __future__ import annotations

import importlib.util
import logging

import torch

from engine.attention.backend import AttentionBackend
from engine.attention.torch_sdpa import TorchAttention
from engine.errors import ConfigError

logger = logging.getLogger("trunkline.engine")

_FLASH_ATTN_CAPABILITY = (8, 0)
"""Oldest GPUs that flash-attn 2 runs on: Ampere."""
_FLASH_ATTN_BLOCK = 256
"""Blocks of flash-attn 2's paged kernels are multiples of so many tokens."""
_FLASH_ATTN_HEAD = 256
"""Largest head size of flash-attn 2."""


def select_backend(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    block_size: int | None = None,
) -> AttentionBackend:
    """The backend called `name`, or with `auto` the fastest that can run the model here.

    Args:
        name: as in `EngineConfig.attention_backend`.
        device: where the model runs.
        dtype: of its activations and of the cache.
        head_dim: size of its heads.
        block_size: tokens in a block, if the configuration sets them.

    Raises:
        ConfigError: the backend asked for cannot run the model here.
    """
    if name == "auto":
        name = "triton" if device.type == "cuda" else "torch_sdpa"
        logger.info("attention backend: %s", name)
    if name == "triton":
        if device.type != "cuda":
            raise _refusal(name, "it needs a GPU")
        from engine.attention.triton_paged import TritonAttention

        return TritonAttention()
    if name == "flash_attn":
        obstacle = _flash_attn_obstacle(device, dtype, head_dim, block_size or _FLASH_ATTN_BLOCK)
        if obstacle is not None:
            raise _refusal(name, obstacle)
        from engine.attention.flash_attn import FlashAttention

        return FlashAttention()
    return TorchAttention()


def _refusal(name: str, obstacle: str) -> ConfigError:
    return ConfigError(
        f"attention_backend '{name}' cannot be used: {obstacle}; change that, or set "
        "attention_backend to 'auto'."
    )


def _flash_attn_obstacle(
    device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int
) -> str | None:
    """Why flash-attn cannot run here, or None."""
    if device.type != "cuda":
        return "it needs a GPU"
    obstacles = (
        (
            dtype not in (torch.bfloat16, torch.float16),
            f"it needs dtype bfloat16 or float16, not {str(dtype).removeprefix('torch.')}",
        ),
        (
            torch.cuda.get_device_capability(device) < _FLASH_ATTN_CAPABILITY,
            "it needs a GPU of compute capability 8.0 or newer",
        ),
        (
            importlib.util.find_spec("flash_attn") is None,
            "the package flash-attn is not installed",
        ),
        (
            head_dim > _FLASH_ATTN_HEAD or head_dim % 8 != 0,
            f"it needs heads of at most {_FLASH_ATTN_HEAD}, in multiples of 8, not of {head_dim}",
        ),
        (
            block_size % _FLASH_ATTN_BLOCK != 0,
            f"it needs a kvcache_block_size that is a multiple of {_FLASH_ATTN_BLOCK}, not "
            f"{block_size}",
        ),
    )
    return next((obstacle for there, obstacle in obstacles if there), None)
