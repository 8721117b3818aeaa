"""Where probes run, and how an operation is timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from benchmarks.probes.gpu_samples import Sample, watch_gpu

Call = Callable[[], object]

_COLD_BYTES = 160 * 2**20
"""What the buffers of one measurement hold together: three times the L2 cache of an H200."""
_MAX_COPIES = 512
_MIN_CALLS = 24
"""Calls in a graph, so that the gap between two replays does not count."""
_REPLAYS = 7
_PAUSE = 2.0
"""Seconds in which the GPU cools and its power budget recovers before a burst."""


@dataclass
class Sustained:
    """What came of the same work done over and over."""

    microseconds: list[float]
    """Of each pass, the first one after a pause."""
    samples: list[Sample]
    """Of the GPU meanwhile."""

    @property
    def settled(self) -> float:
        """Median microseconds of the passes in the second half."""
        return statistics.median(self.microseconds[len(self.microseconds) // 2 :])


class Bench:
    """Times operations on one GPU.

    Args:
        device: the GPU.
        dtype: of weights, caches and activations.
        cold_bytes: what the distinct buffers of a measurement should hold together.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
        cold_bytes: int = _COLD_BYTES,
    ) -> None:
        self.device, self.dtype, self._cold_bytes = device, dtype, cold_bytes

    def randn(self, *shape: int) -> torch.Tensor:
        """Standard normal numbers: products of zeros would draw less power than real ones."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def copies(self, nbytes: int) -> int:
        """How many distinct buffers of so many bytes outgrow the L2 cache: at least 2."""
        return max(2, min(_MAX_COPIES, -(-self._cold_bytes // nbytes)))

    def time(self, calls: Sequence[Call]) -> float:
        """Median microseconds of a call when all run in turn, replayed from one CUDA graph.

        Each should use buffers of its own, `copies` of them, as the layers of a model do.
        """
        calls = list(calls) * -(-_MIN_CALLS // len(calls))
        graph = _capture(calls)
        _replay(graph, 1)
        return statistics.median(_replay(graph, _REPLAYS)) / len(calls)

    def burst(self, call: Call, warm_up: int = 3, count: int = 10) -> list[float]:
        """Microseconds of each of the first few calls after a pause; too few to be slowed down."""
        call()
        torch.cuda.synchronize()
        time.sleep(_PAUSE)
        for _ in range(warm_up):
            call()
        return _elapsed(call, count)

    def sustain(self, calls: Sequence[Call], seconds: float) -> Sustained:
        """Run all calls as one pass, from a CUDA graph, for so many seconds without a gap."""
        graph = _capture(calls)
        _replay(graph, 1)
        time.sleep(_PAUSE / 2)
        with watch_gpu(self.device) as samples:
            first = _replay(graph, 1)
            passes = _replay(graph, max(4, round(seconds * 1e6 / first[0])))
        return Sustained(first + passes, samples)


def _capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """All calls in one graph; they run once before, so that kernels are compiled and chosen."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _replay(graph: torch.cuda.CUDAGraph, count: int) -> list[float]:
    return _elapsed(graph.replay, count)


def _elapsed(call: Call, count: int) -> list[float]:
    """Microseconds of each of `count` calls, queued one right after the other."""
    marks: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) * 1e3 for a, b in pairwise(marks)]
