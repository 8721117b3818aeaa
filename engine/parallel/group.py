"""The ranks that share a model, and what they exchange within a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import distributed

_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
"""torch 2.13 has renamed it."""


@dataclass(frozen=True)
class TensorGroup:
    """This rank among those of its engine. All ranks make the same calls in the same order.

    With one rank nothing is exchanged.
    """

    rank: int = 0
    size: int = 1

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' x, in place."""
        if self.size > 1:
            distributed.all_reduce(x)
        return x

    def concatenate(self, x: torch.Tensor) -> torch.Tensor:
        """All ranks' columns side by side: [rows, width] → [rows, size · width]."""
        if self.size == 1:
            return x
        rows, width = x.shape
        pieces = x.new_empty(self.size * rows, width)
        _gather(pieces, x.contiguous())
        return pieces.view(self.size, rows, width).transpose(0, 1).reshape(rows, -1)

    def least(self, value: float, device: torch.device) -> float:
        """The smallest of all ranks' values."""
        return -self.most(-value, device)

    def most(self, value: float, device: torch.device) -> float:
        """The largest of all ranks' values."""
        if self.size == 1:
            return value
        values = torch.tensor([value], dtype=torch.float64, device=device)
        distributed.all_reduce(values, distributed.ReduceOp.MAX)
        return values.item()


ALONE = TensorGroup()
