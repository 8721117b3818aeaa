"""Memory of each rank's GPU that the others read and write, for the sums of few rows.

Such sums are bound by the time in which ranks hear of each other, which torch's kernel over
symmetric memory does sooner than NCCL's: see "Tensor parallelism" in `docs/performance-notes.md`.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import distributed
from torch.distributed import _symmetric_memory as symmetric

MAX_ROWS = 1024
"""Of the sums that the memory has room for."""
_DTYPES = (torch.bfloat16, torch.float32)
"""Those that torch's kernel adds up."""
_RELEASE_LIMIT_S = 10.0
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
        self._handle: Any = symmetric.rendezvous(self._rows, self._name)

    def rows(self, count: int) -> torch.Tensor | None:
        """Where so many summands go, [count, width]; None if they are too many."""
        return self._rows[:count] if count <= MAX_ROWS else None

    def holds(self, x: torch.Tensor) -> bool:
        """Whether x lies in this memory."""
        return x.data_ptr() == self._rows.data_ptr()

    def sum(self, x: torch.Tensor) -> None:
        """Sum all ranks' x, which `rows` gave, in place."""
        torch.ops.symm_mem.two_shot_all_reduce_(x, "sum", self._name)

    def release(self) -> None:
        """Let kernels that wait for a lost rank end: what they compute means nothing.

        A kernel waits until each other rank has set this one's signal, and until that rank has
        reset its own: both are done here, in that rank's place.
        """
        mine, count = self._handle.rank, self._handle.world_size
        pads = [self._handle.get_signal_pad(rank) for rank in range(count)]
        stream, began = torch.cuda.default_stream(), time.monotonic()
        with torch.cuda.stream(torch.cuda.Stream()):
            while (elapsed := time.monotonic() - began) < _RELEASE_LIMIT_S:
                if elapsed > _LAST_LAUNCH_S and stream.query():
                    break
                for rank, pad in enumerate(pads):
                    pad.fill_(int(rank == mine))
                torch.cuda.current_stream().synchronize()
