"""Drawing the next tokens from logits: at random, greedily, and among the likeliest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch

from benchmarks.probes.bench import Bench, Call
from benchmarks.probes.records import Record, record
from benchmarks.roofline import Shape
from engine.kernels.draw import draw
from engine.kernels.truncate import truncation_threshold

_SPREAD = 3.0
"""Standard deviation of the logits."""


def measure(
    bench: Bench, shapes: Mapping[str, Shape], *, batches: Sequence[int] = (1, 64, 256, 512)
) -> Iterator[Record]:
    """Every batch, with the first model's vocabulary; bytes are those of reading the logits once.

    The logits come from memory; those of a small batch lie in the L2 cache when a model draws.
    """
    vocabulary = next(iter(shapes.values())).vocabulary
    for batch in batches:
        size = batch * vocabulary * bench.dtype.itemsize
        logits = [bench.randn(batch, vocabulary) * _SPREAD for _ in range(bench.copies(size))]
        for method, calls in _methods(bench, logits):
            sizes = {"batch": batch, "vocabulary": vocabulary}
            yield record(method, sizes, bench.time(calls), nbytes=size)


def _methods(bench: Bench, logits: Sequence[torch.Tensor]) -> Iterator[tuple[str, list[Call]]]:
    rows = torch.arange(len(logits[0]), device=bench.device)
    positions, seeds = rows + 1000, rows[:, None].contiguous()

    def column(value: float) -> torch.Tensor:
        return torch.full((len(rows), 1), value, device=bench.device)

    warm, cold = column(0.7), column(0.0)
    top_k, top_p, log_min_p = column(50).long(), column(0.9), column(-math.inf)

    def draw_truncated(lines: torch.Tensor) -> torch.Tensor:
        threshold = truncation_threshold(lines, rows, warm, top_k, top_p, log_min_p)
        return draw(lines, rows, positions, warm, seeds, threshold)

    for method, temperature in (("draw, temperature 0.7", warm), ("draw, greedy", cold)):
        yield (
            method,
            [partial(draw, lines, rows, positions, temperature, seeds) for lines in logits],
        )
    yield (
        "truncation_threshold and draw, temperature 0.7, top_p 0.9, top_k 50",
        [partial(draw_truncated, lines) for lines in logits],
    )
