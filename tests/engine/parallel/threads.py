"""Ranks that are threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from engine.parallel.group import TensorGroup

T = TypeVar("T")


class Table:
    """Where the ranks lay what they exchange."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size)
        self._laid: list[torch.Tensor] = [torch.empty(0)] * size

    def exchange(self, rank: int, x: torch.Tensor) -> list[torch.Tensor]:
        self._laid[rank] = x.clone()
        self._barrier.wait(60)
        found = list(self._laid)
        self._barrier.wait(60)
        return found


@dataclass(eq=False)
class ThreadGroup(TensorGroup):
    table: Table = field(default_factory=lambda: Table(1))

    summands: torch.Tensor | None = None
    """Memory for those of few rows."""

    def summand(self, rows: int) -> torch.Tensor | None:
        return None if self.summands is None else self.summands[:rows]

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(torch.stack(self.table.exchange(self.rank, x)).sum(0))

    def concatenate(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.table.exchange(self.rank, x), dim=1)


def run_ranks(size: int, work: Callable[[TensorGroup], T]) -> list[T]:
    """What each rank's `work` gave."""
    table = Table(size)
    with ThreadPoolExecutor(size) as threads:
        ranks = [threads.submit(work, ThreadGroup(rank, size, table=table)) for rank in range(size)]
        return [rank.result(120) for rank in ranks]
