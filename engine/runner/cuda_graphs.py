"""CUDA graphs of the forward pass, one for each of a few batch sizes."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch

from engine.runner.input_batch import StepInputs
from engine.step import StepPlan

_MARGIN = 1.02
"""How much longer than a larger size one may take, so that noise drops none."""
MAX_PADDED_TOKENS = 1024
"""Most tokens of a graph for steps that prefill."""
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


def padded_graph_sizes(max_num_tokens: int) -> list[int]:
    """Tokens of the graphs for steps that prefill.

    Larger steps compute for longer than it takes to launch their kernels one by one. Where sizes
    are 32 apart, libraries' products gain by it; where they do not, the size is dropped.
    """
    sizes = [64, *range(128, 321, 32), *range(384, 513, 64)]
    sizes += range(640, MAX_PADDED_TOKENS + 1, 128)
    return [size for size in sizes if size <= max_num_tokens]


class StepGraphs:
    """Captures the forward pass over batches of one kind, and replays it.

    A graph costs one launch where the pass costs hundreds. What it computes lies at the same
    addresses at every replay, so that hidden states must be used before the next one.

    Args:
        sizes: batch sizes, rising.
        measure: size of the batch that a plan needs, before padding; None if it is not of the kind.
        build: a plan's batch of a size, at the addresses of all batches of that size.
        forward: the pass; it may launch kernels only, and wait for nothing.
        agree: a time of the slowest rank, given this one's, so that all keep the same sizes.
    """

    def __init__(
        self,
        sizes: list[int],
        measure: Callable[[StepPlan], int | None],
        build: Callable[[StepPlan, int], StepInputs],
        forward: Forward,
        agree: Callable[[float], float],
    ) -> None:
        self._sizes = sizes
        self.seconds: dict[int, float] = {}
        """Of a replay of each size that was captured, rising."""
        self._measure = measure
        self.build = build
        self._forward = forward
        self._agree = agree
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    def size_for(self, plan: StepPlan) -> int | None:
        """Size of the graph that runs `plan`; None where none does."""
        needed = self._measure(plan)
        if needed is None or not self._sizes or needed > self._sizes[-1]:
            return None
        return self._sizes[bisect_left(self._sizes, needed)]

    def capture(self, pool: Any) -> None:
        """Capture every size in the memory of `pool`.

        The largest comes first and the others share its memory, but for their hidden states.
        """
        for size in reversed(self._sizes):
            batch = self.build(StepPlan(0), size)
            self._forward(batch)  # kernels are compiled and libraries choose theirs before
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                hidden = self._forward(batch)
            self._captured[size] = (graph, hidden)
        self._drop_slow_sizes()

    def _drop_slow_sizes(self) -> None:
        """Drop every size that takes longer than a larger one.

        The libraries' products are far from smooth in the number of rows.
        """
        best, kept = math.inf, {}
        for size in reversed(self._sizes):
            self.build(StepPlan(0), size)  # the addresses hold a batch of another size
            seconds = self._agree(self._time(size))
            if seconds < best * _MARGIN:
                best = kept[size] = min(best, seconds)
            else:
                del self._captured[size]
        self.seconds = dict(reversed(kept.items()))
        self._sizes = list(self.seconds)

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

    def release(self) -> None:
        """Free the graphs, whoever still refers to them."""
        for graph, _ in self._captured.values():
            graph.reset()
        self._captured, self._sizes, self.seconds = {}, [], {}

    def replay(self, size: int) -> torch.Tensor:
        """Run the pass over the batch of `size` rows that was uploaded last."""
        graph, hidden = self._captured[size]
        graph.replay()
        return hidden
