"""The ranks that share a model, and what they exchange within a step."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import distributed

from engine.parallel.shared_memory import SharedMemory, can_share

_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
"""torch 2.13 has renamed it."""
logger = logging.getLogger(__name__)


@dataclass(eq=False)
class TensorGroup:
    """This rank among those of its engine. All ranks make the same calls in the same order.

    With one rank nothing is exchanged.
    """

    rank: int = 0
    size: int = 1
    processes: distributed.ProcessGroup | None = None
    """Torch's, of the ranks' processes."""
    _shared: SharedMemory | None = field(default=None, init=False)

    def share_memory(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        """Let sums of few rows go through memory that all ranks reach, if all can.

        Args:
            width: of the rows.
            dtype: of the rows.
            device: of this rank.
        """
        if self.processes is None or device.type != "cuda":
            return
        shared = None
        if self.least(can_share(dtype), device):
            try:
                shared = SharedMemory(self.processes, width, dtype)
            except RuntimeError as error:
                logger.warning("ranks share no memory: %s", str(error).splitlines()[0])
        if self.least(shared is not None, device):
            self._shared = shared

    def leave(self, *, lost: bool = False) -> None:
        """Leave the group for good.

        On GPUs it waits, as NCCL does, until there are no CUDA graphs any more with exchanges of
        the group in them.

        Args:
            lost: a rank is gone; exchanges that it will never finish end or fail, or else this
                process ends.
        """
        shared, self._shared = self._shared, None
        if lost and shared is not None:
            threading.Thread(target=shared.end_process_if_stuck, daemon=True).start()
        if self.processes is not None:
            with suppress(Exception):  # it may have failed already, or been left
                distributed.distributed_c10d._abort_process_group(self.processes)

    def summand(self, rows: int) -> torch.Tensor | None:
        """Where this rank's part of a sum is best computed, [rows, width]; None if anywhere.

        The sum before, of as many rows, lies there as well.
        """
        return None if self._shared is None else self._shared.rows(rows)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' x, in place."""
        if self._shared is not None and self._shared.holds(x):
            self._shared.sum(x)
        elif self.size > 1:
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
