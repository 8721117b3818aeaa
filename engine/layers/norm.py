"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension.

    Args:
        size: of the last dimension.
        eps: keeps the root away from 0.
        dtype: of the weight.
        device: of the weight.
    """

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.ones(size, dtype=dtype, device=device)
        self._floor = torch.tensor(math.sqrt(size * eps))
        self._scaled: torch.Tensor | None = None
        self._kernel: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor] | None = None
        if device.type == "cuda":
            from engine.kernels.norm import rms_norm

            self._kernel = rms_norm

    def finalize(self) -> None:
        """Prepare the loaded weight for the device."""
        if self.weight.device.type == "cpu" and self.weight.dtype == torch.float32:
            self._scaled = self.weight * math.sqrt(len(self.weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[…, size] → the same; on CUDA [rows, size]."""
        if self._kernel is not None:
            return self._kernel(x, self.weight, self.eps)
        if self._scaled is None:
            return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        # The same as sqrt(n) · x / sqrt(‖x‖² + n · eps): on CPU half the passes of rms_norm.
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self._floor)
        return x.div(length).mul_(self._scaled)
