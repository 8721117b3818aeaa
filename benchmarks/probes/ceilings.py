"""What the GPU can do at most: a copy, and products in a burst and sustained.

One pass of the sustained products is the four weights of every layer of a model in turn. Its first
pass, after a pause, beside the later ones tells what the power cap costs at the same sizes.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch.nn.functional import linear

from benchmarks.probes.bench import Bench, Call
from benchmarks.probes.gpu_samples import summarise
from benchmarks.probes.records import Record, record
from benchmarks.probes.weights import weight_sizes
from benchmarks.roofline import Shape

_COPY_BYTES = 4 * 2**30


def measure(
    bench: Bench,
    shapes: Mapping[str, Shape],
    *,
    copy_bytes: int = _COPY_BYTES,
    side: int = 8192,
    rows: Sequence[int] = (2048, 8192, 16384),
    seconds: float = 3.0,
) -> Iterator[Record]:
    """A copy, a square product in a burst and sustained, and the products of a model."""
    yield measure_copy(bench, copy_bytes)
    a, b = bench.randn(side, side), bench.randn(side, side)
    product, flops, sizes = partial(linear, a, b), 2 * side**3, {"m": side, "n": side, "k": side}
    microseconds = statistics.median(bench.burst(product))
    yield record("product, burst", sizes, microseconds, flops=flops)
    yield _sustain(bench, [product] * 10, flops * 10, sizes, seconds)
    name, shape = next(iter(shapes.items()))
    weights = {n: [bench.randn(*s) for _ in range(shape.layers)] for n, s in weight_sizes(shape)}
    for count in rows:
        calls, flops = _model_pass(bench, list(weights.values()), count)
        yield _sustain(bench, calls, flops, {"model": name, "rows": count}, seconds)


def measure_copy(bench: Bench, nbytes: int = _COPY_BYTES) -> Record:
    """A copy within the GPU's memory; bytes read and bytes written are both counted.

    By a kernel (adding 0): a captured copy becomes a node of its own kind, which is slower.
    """
    source = bench.randn(nbytes // bench.dtype.itemsize)
    target = source.clone()
    microseconds = bench.time([partial(torch.add, source, 0, out=target)])
    return record("copy", {"bytes": nbytes}, microseconds, nbytes=2 * nbytes)


def _model_pass(
    bench: Bench, weights: Sequence[Sequence[torch.Tensor]], rows: int
) -> tuple[list[Call], int]:
    """The products of `rows` tokens with the weights of all layers, and their FLOPs."""
    inputs = {w.shape[1]: bench.randn(rows, w.shape[1]) for w, *_ in weights}
    calls: list[Call] = [
        partial(linear, inputs[w.shape[1]], w)
        for layer in zip(*weights, strict=True)
        for w in layer
    ]
    return calls, 2 * rows * sum(w.numel() for copies in weights for w in copies)


def _sustain(
    bench: Bench, calls: Sequence[Call], flops: int, shape: Mapping[str, object], seconds: float
) -> Record:
    """One pass, once the GPU has settled, beside the first one after a pause."""
    done = bench.sustain(calls, seconds)
    return record(
        "products, sustained",
        {**shape, "products": len(calls)},
        done.settled,
        flops=flops,
        first_tflop_s=round(flops / done.microseconds[0] / 1e6, 1),
        passes=len(done.microseconds),
        gpu=summarise(done.samples),
    )
