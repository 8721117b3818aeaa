"""The ranks that share a model, and what they exchange within a step."""

from __future__ import annotations

from contextlib import suppress
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
    processes: distributed.ProcessGroup | None = None
    """Torch's, of the ranks' processes."""

    def leave(self) -> None:
        """Leave the group for good: exchanges that a lost rank will never finish fail.

        On GPUs it waits, as NCCL does, until there are no CUDA graphs any more with exchanges of
        the group in them.
        """
        if self.processes is not None:
            with suppress(Exception):  # it may have failed already, or been left
                distributed.distributed_c10d._abort_process_group(self.processes)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' x, in place."""
        if self.size > 1:
            distributed.all_reduce(x, group=self.processes)
        return x

    def concatenate(self, x: torch.Tensor) -> torch.Tensor:
        """All ranks' columns side by side: [rows, width] → [rows, size · width]."""
        if self.size == 1:
            return x
        rows, width = x.shape
        pieces = x.new_empty(self.size * rows, width)
        _gather(pieces, x.contiguous(), group=self.processes)
        return pieces.view(self.size, rows, width).transpose(0, 1).reshape(rows, -1)

    def least(self, value: float, device: torch.device) -> float:
        """The smallest of all ranks' values."""
        return -self.most(-value, device)

    def most(self, value: float, device: torch.device) -> float:
        """The largest of all ranks' values."""
        if self.size == 1:
            return value
        values = torch.tensor([value], dtype=torch.float64, device=device)
        distributed.all_reduce(values, distributed.ReduceOp.MAX, group=self.processes)
        return values.item()


ALONE = TensorGroup()
