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


def select_backend(name: str, device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    """The backend called `name`, or with `auto` the fastest that can run here.

    Raises:
        ConfigError: the backend asked for cannot run here.
    """
    if name == "auto":
        name = "triton" if device.type == "cuda" else "torch_sdpa"
        logger.info("attention backend: %s", name)
    if name == "triton":
        if device.type != "cuda":
            raise ConfigError("attention_backend 'triton' cannot be used: it needs a GPU.")
        from engine.attention.triton_paged import TritonAttention

        return TritonAttention()
    if name == "flash_attn":
        obstacle = _flash_attn_obstacle(device, dtype)
        if obstacle is not None:
            raise ConfigError(f"attention_backend 'flash_attn' cannot be used: {obstacle}.")
        from engine.attention.flash_attn import FlashAttention

        return FlashAttention()
    return TorchAttention()


def _flash_attn_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why flash-attn cannot run here, or None."""
    if device.type != "cuda":
        return "it needs a GPU"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it needs dtype bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(device) < _FLASH_ATTN_CAPABILITY:
        return "it needs a GPU of compute capability 8.0 or newer"
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    return None
