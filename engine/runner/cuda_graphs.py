"""CUDA graphs of the decode step, one for each of a few batch sizes."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable

import torch

from engine.runner.input_batch import StepInputs
from engine.step import StepPlan

_MARGIN = 1.02
"""How much longer than a larger size one may take, so that noise drops none."""
Forward = Callable[[StepInputs], torch.Tensor]
"""Input tensors to hidden states."""


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes that get a graph, the largest one `max_num_seqs`.

    Small ones are those of the kernels' tiles. Further up they are 8 to 64 apart: a step of a few
    padded rows takes as long as one without.
    """
    sizes = [1, 2, 4, 8, 16, 24, 32, *range(48, 129, 16), *range(136, 257, 8)]
    sizes += [*range(288, 513, 32), *range(576, max_num_seqs + 1, 64)]
    return [*(size for size in sizes if size < max_num_seqs), max_num_seqs]


class DecodeGraphs:
    """Captures the forward pass over decode batches, and replays it.

    A graph costs one launch where the pass costs hundreds. What it computes lies at the same
    addresses at every replay, so that hidden states must be used before the next one.

    Args:
        sizes: batch sizes, rising.
        forward: the pass; it may launch kernels only, and wait for nothing.
    """

    def __init__(self, sizes: list[int], forward: Forward) -> None:
        self._sizes = sizes
        self._forward = forward
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    def size_for(self, plan: StepPlan) -> int | None:
        """Size of the graph that runs `plan`; None where none does."""
        rows = len(plan.rows)
        if rows > self._sizes[-1] or plan.total_tokens != rows or not all(plan.samples):
            return None
        return self._sizes[bisect_left(self._sizes, rows)]

    def capture(self, inputs: Callable[[int], StepInputs]) -> None:
        """Capture every size; `inputs` gives a batch at the addresses of all batches of that size.

        The largest comes first and the others share its memory, but for their hidden states.
        """
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(self._sizes):
            batch = inputs(size)
            self._forward(batch)  # kernels are compiled and libraries choose theirs before
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                hidden = self._forward(batch)
            self._captured[size] = (graph, hidden)
        self._drop_slow_sizes(inputs)

    def _drop_slow_sizes(self, inputs: Callable[[int], StepInputs]) -> None:
        """Drop every size that takes longer than a larger one.

        The libraries' products are far from smooth in the number of rows.
        """
        best, kept = math.inf, []
        for size in reversed(self._sizes):
            inputs(size)  # the addresses hold a batch of another size
            seconds = self._time(size)
            if seconds < best * _MARGIN:
                best = min(best, seconds)
                kept.append(size)
            else:
                del self._captured[size]
        self._sizes = kept[::-1]

    def _time(self, size: int) -> float:
        """Seconds of a replay over the batch uploaded last: the shorter of two."""
        self.replay(size)  # the first one also brings the graph to the device
        times = []
        for _ in range(2):
            torch.cuda.synchronize()
            began = time.perf_counter()
            self.replay(size)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return min(times)

    def replay(self, size: int) -> torch.Tensor:
        """Run the pass over the batch of `size` rows that was uploaded last."""
        graph, hidden = self._captured[size]
        graph.replay()
        return hidden
