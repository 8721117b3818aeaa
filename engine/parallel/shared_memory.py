"""Memory of each rank's GPU that the others read and write, for the sums of few rows.

Such sums are bound by the time in which ranks hear of each other, which torch's kernel over
symmetric memory does sooner than NCCL's: see "Tensor parallelism" in `docs/performance-notes.md`.
"""

from __future__ import annotations

import logging
import os
import time

import torch
from torch import distributed
from torch.distributed import _symmetric_memory as symmetric

logger = logging.getLogger(__name__)

MAX_ROWS = 1024
"""Of the sums that the memory has room for."""
_DTYPES = (torch.bfloat16, torch.float32)
"""Those that torch's kernel adds up."""
STUCK = 18
"""Exit status of a process whose GPU waits for a lost rank."""
_STUCK_LIMIT_S = 12.0
"""By when the GPU has done all that it can, and who looks after the process has had time to end it
in a better way."""
_LAST_LAUNCH_S = 0.5
"""After a rank was lost, by when no step is launched any more."""
_shared: list[str] = []
"""Names of the groups with which this process has shared memory."""


def can_share(dtype: torch.dtype) -> bool:
    """Whether this process may share memory for sums of this type.

    It may once: torch numbers what a process exchanges for it, and processes that have begun to do
    so at different times would wait for each other for ever.
    """
    return dtype in _DTYPES and not _shared


class SharedMemory:
    """The memory in which ranks sum up.

    Args:
        processes: of the ranks, on GPUs that reach each other's memory.
        width: of the rows.
        dtype: one that `can_share`.

    Raises:
        RuntimeError: the GPUs cannot reach each other's memory.
    """

    def __init__(self, processes: distributed.ProcessGroup, width: int, dtype: torch.dtype) -> None:
        self._name = processes.group_name
        _shared.append(self._name)
        device = torch.device("cuda", torch.cuda.current_device())
        self._rows = symmetric.empty(MAX_ROWS, width, dtype=dtype, device=device)
        symmetric.rendezvous(self._rows, self._name)
        self._steps = torch.cuda.default_stream(device)

    def rows(self, count: int) -> torch.Tensor | None:
        """Where so many summands go, [count, width]; None if they are too many."""
        return self._rows[:count] if count <= MAX_ROWS else None

    def holds(self, x: torch.Tensor) -> bool:
        """Whether x lies in this memory."""
        return x.data_ptr() == self._rows.data_ptr()

    def sum(self, x: torch.Tensor) -> None:
        """Sum all ranks' x, which `rows` gave, in place."""
        torch.ops.symm_mem.two_shot_all_reduce_(x, "sum", self._name)

    def end_process_if_stuck(self) -> None:
        """To be called when a rank is lost: if the device waits for it, end this process.

        The kernel waits for signals in memory of the lost rank, where nothing can be set any more,
        and no kernel can be ended from outside: whatever else this process wants of the device, its
        own orderly end included, would wait with it.
        """
        deadline = time.monotonic() + _STUCK_LIMIT_S
        time.sleep(_LAST_LAUNCH_S)
        while not self._steps.query():
            if time.monotonic() > deadline:
                logger.critical("the GPU waits for ever for a rank that was lost: ending")
                os._exit(STUCK)
            time.sleep(_LAST_LAUNCH_S)
