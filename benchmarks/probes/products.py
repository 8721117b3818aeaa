"""Products of few rows with a layer's weights: cuBLAS beside this engine's kernel.

As in the model: the outputs of attention and of the feed-forward block are added to the residual in
the same call, those of the other two weights are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch.nn.functional import linear

from benchmarks.probes.bench import Bench, Call
from benchmarks.probes.ceilings import measure_copy
from benchmarks.probes.records import Record, record
from benchmarks.probes.weights import weight_sizes
from benchmarks.roofline import Shape
from engine.kernels.linear import MAX_ROWS, skinny_linear

_COPY_BYTES = 2**31
_ADDED = ("o", "down")
"""Weights whose product is added to the residual."""


def measure(
    bench: Bench,
    shapes: Mapping[str, Shape],
    *,
    copy_bytes: int = _COPY_BYTES,
    rows: Sequence[int] = (1, 16, 32, 64),
) -> Iterator[Record]:
    """Every weight of every model at every number of rows, `of_copy` as a share of a copy's speed.

    The bytes are those of the weight, the inputs, the outputs and the residual.
    """
    copy = measure_copy(bench, copy_bytes)
    yield copy
    for model, shape in shapes.items():
        for name, (outputs, inputs) in weight_sizes(shape):
            size = outputs * inputs * bench.dtype.itemsize
            weights = [bench.randn(outputs, inputs) for _ in range(bench.copies(size))]
            for count in rows:
                moved = size + count * (inputs + outputs) * bench.dtype.itemsize
                if name in _ADDED:
                    moved += count * outputs * bench.dtype.itemsize
                sizes = {"model": model, "weight": name, "rows": count}
                for method, calls in _methods(bench, weights, count, name in _ADDED):
                    entry = record(method, sizes, bench.time(calls), nbytes=moved)
                    yield entry | {"of_copy": round(entry["gb_s"] / copy["gb_s"], 3)}


def _methods(
    bench: Bench, weights: Sequence[torch.Tensor], rows: int, added: bool
) -> Iterator[tuple[str, list[Call]]]:
    outputs, inputs = weights[0].shape
    x, residual = bench.randn(rows, inputs), bench.randn(rows, outputs) if added else None
    if residual is None:
        yield "linear", [partial(linear, x, weight) for weight in weights]
    else:
        yield "addmm_", [partial(residual.addmm_, x, weight.t()) for weight in weights]
    if rows <= MAX_ROWS:
        yield "skinny_linear", [partial(skinny_linear, x, w, None, residual) for w in weights]
