"""Thresholds of min_p, top_k and top_p: exact, without a sort of the vocabulary.

Two or three passes over the logits leave a few thousand candidates (`engine.kernels.narrow`), among
which the threshold is found bit by bit. A row whose candidates stay too many is left to one program
(`engine.kernels.bisect_row`): two values that share almost all tokens, min_p and top_p on a flat
row, or top_k of thousands and top_p.
"""

from __future__ import annotations

from functools import cache, partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels.bisect_row import bisect_row
from engine.kernels.draw import order, scale_logits, unorder
from engine.kernels.launch import overlaps_launches
from engine.kernels.narrow import (
    GATHERED,
    PIVOTS,
    STATE,
    is_nan,
    largest_logit,
    measure_kernel,
    narrow_kernel,
    row_options,
    sample_kernel,
    suffices,
    weigh,
)

_SAMPLE = 1024
"""Tokens of a row that the first pivots come from."""
_UNIT = 8192
"""Tokens that a program looks at, in registers."""
_WARPS = 8
_CAPACITY = 4096
"""Most candidates."""
_BLOCK = 8192
"""Tokens of a row that `bisect_row` reads at a time."""
_FINISH_WARPS = 32


@triton.jit
def _select(x, weights, above, goal, is_valid):
    """The largest value at which the weights not below it, with `above`, reach the goal.

    Radix selection from the highest bit on; the smallest value if rounding leaves none.
    """
    key = order(x)
    best = tl.full((), -0x80000000, tl.int64)
    for bit in range(32):
        middle = best + (tl.full((), 0x80000000, tl.int64) >> bit)
        weight = above + tl.sum(tl.where(key >= middle.to(tl.int32), weights, 0.0))
        best = tl.where(weight >= goal, middle, best)
    smallest = tl.min(tl.where(is_valid, key, 0x7F800000))
    return unorder(tl.maximum(best.to(tl.int32), smallest))


@triton.jit
def _among_candidates(
    threshold, found, state, largest, reference, temperature, top_k, top_p,
    CAPACITY: tl.constexpr, VOCAB: tl.constexpr,
):  # fmt: skip
    """Raise the threshold, which is that of min_p, by top_k and top_p."""
    place = tl.arange(0, CAPACITY)
    is_valid = place < tl.load(state + 1).to(tl.int32)
    above, target = tl.load(state + 2), tl.load(state + 3)
    raw = tl.load(found + place, mask=is_valid, other=float("-inf"))
    x = scale_logits(raw, temperature)
    if top_k < VOCAB:
        ones = tl.where(is_valid, 1.0, 0.0)
        kth = _select(x, ones, above, top_k.to(tl.float32), is_valid)
        threshold = tl.maximum(threshold, kth)
    if top_p < 1:
        # Without a target the candidates are all that is left.
        weights = weigh(raw, tl.where(target > 0, reference, largest), temperature)
        weights = tl.where(is_valid & (x >= threshold), weights, 0.0)
        goal = tl.where(target > 0, target, tl.sum(weights) * top_p)
        nucleus = _select(x, weights, above, tl.maximum(goal, 1e-30), is_valid)
        threshold = tl.maximum(threshold, nucleus)
    return threshold


@triton.jit
def _only_value(extremes, num_units, UNITS: tl.constexpr):
    """The logit of all tokens in the interval of a line; NaN if they differ."""
    unit = tl.arange(0, UNITS)
    largest = tl.load(extremes + unit * 2, mask=unit < num_units, other=float("-inf"))
    smallest = tl.load(extremes + unit * 2 + 1, mask=unit < num_units, other=float("inf"))
    value = tl.max(largest)
    return tl.where(value == tl.min(smallest), value, float("nan"))


@triton.jit
def _searched(
    threshold, line, found, state, extremes, largest, reference, num_units,
    temperature, top_k, top_p, log_min_p,
    CAPACITY: tl.constexpr, VOCAB: tl.constexpr, UNITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Raise the threshold, which is that of min_p, by top_k and top_p: as far as narrowing came."""
    if tl.load(state) == GATHERED:
        threshold = _among_candidates(
            threshold, found, state, largest, reference, temperature, top_k, top_p,
            CAPACITY, VOCAB,
        )  # fmt: skip
    else:
        value = _only_value(extremes, num_units, UNITS)
        if ~is_nan(value) & suffices(top_k < VOCAB, top_p, tl.load(state + 3)):
            threshold = tl.maximum(threshold, scale_logits(value, temperature))
        else:
            threshold = bisect_row(
                line, temperature, top_k, top_p, log_min_p, found, CAPACITY, VOCAB, BLOCK
            )
    return threshold


@triton.jit(do_not_specialize=["num_units"], do_not_specialize_on_alignment=["rows"])
def _finish_kernel(
    logits, rows, temperatures, top_ks, top_ps, log_min_ps,
    references, peaks, states, last_states, found, extremes, thresholds,
    num_units, logits_stride, stride, top_k_stride,
    CAPACITY: tl.constexpr, VOCAB: tl.constexpr, UNITS: tl.constexpr, STATE: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The threshold of each line."""
    place = tl.program_id(0).to(tl.int64)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    temperature, top_k, top_p, log_min_p = row_options(
        place, rows, temperatures, top_ks, top_ps, log_min_ps, stride, top_k_stride
    )
    searches = (top_k < VOCAB) | (top_p < 1)
    threshold = tl.full((), float("-inf"), tl.float32)
    if (temperature > 0) & (searches | (log_min_p > float("-inf"))):
        largest = largest_logit(peaks, place, num_units, UNITS)
        if log_min_p > float("-inf"):
            threshold = scale_logits(largest, temperature) + log_min_p
        if searches:
            state = states + place * STATE
            if tl.load(state) != GATHERED:
                state = last_states + place * STATE
            threshold = _searched(
                threshold, logits + place * logits_stride, found + place * CAPACITY, state,
                extremes + place * UNITS * 2, largest, tl.load(references + place), num_units,
                temperature, top_k, top_p, log_min_p, CAPACITY, VOCAB, UNITS, BLOCK,
            )  # fmt: skip
    # NaN comes of infinite logits alone; such a line keeps everything.
    tl.store(thresholds + place, tl.where(is_nan(threshold), float("-inf"), threshold))


def truncation_threshold(
    logits: torch.Tensor,
    rows: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    log_min_p: torch.Tensor,
) -> torch.Tensor:
    """The smallest logit / T that each line keeps; ties with it are kept.

    min_p comes first, then top_k, and top_p counts the mass of what these two leave. A line's
    threshold depends on nothing else in the batch. Calls may not overlap on one device: they share
    scratch memory.

    Args:
        logits: bfloat16, float16 or float32 [batch, vocab]; lines may lie apart, tokens may not.
        rows: the row of each line, int64 [batch].
        temperature: of each row, float32 [rows, 1]; rows of temperature 0 keep everything.
        top_k: of each row, int64 [rows, 1]; the vocabulary's size keeps everything.
        top_p: of each row, float32 [rows, 1], as far apart as `temperature`; 1 keeps everything.
        log_min_p: log(min_p), like `top_p`; -inf keeps everything.

    Returns:
        float32 [batch].
    """
    batch, vocab = logits.shape
    thresholds = torch.empty(batch, dtype=torch.float32, device=logits.device)
    overlap = overlaps_launches(logits.device)
    num_units = triton.cdiv(vocab, _UNIT)
    units = triton.next_power_of_2(num_units)
    lines = (logits, rows, temperature, top_k, top_p, log_min_p)
    strides = (logits.stride(0), temperature.stride(0), top_k.stride(0))
    scratch = _scratch(triton.next_power_of_2(batch), units, _CAPACITY, logits.device)
    references, peaks, found, extremes, first, second = scratch
    launch = {"VOCAB": vocab, "OVERLAP": overlap, "launch_pdl": overlap}
    sample = min(_SAMPLE, triton.next_power_of_2(vocab + 1) // 2)
    sample_kernel[(batch,)](
        *lines, references, first.pivots, *strides, SAMPLE=sample,
        SPACING=vocab // max(1, sample // 16), PIVOTS=PIVOTS, num_warps=8, **launch,
    )  # fmt: skip
    vector = 16 // logits.element_size()
    unit = {
        "UNIT": _UNIT, "UNITS": units, "PIVOTS": PIVOTS, "VECTOR": vector,
        "THREADS": min(32 * _WARPS, _UNIT // vector), "num_warps": _WARPS, **launch,
    }  # fmt: skip
    measure_kernel[(num_units, batch)](
        *lines, references, first.pivots, first.counts, first.masses, peaks, *strides, **unit
    )
    narrow = partial(narrow_kernel[(num_units, batch)], *lines, references)
    common = {"CAPACITY": _CAPACITY, "STATE": STATE}
    narrow(
        first.pivots, first.counts, first.masses, peaks, first.state,
        second.pivots, second.counts, second.masses, first.state, found, extremes,
        num_units, *strides, PIVOTS, FIRST=True, **common, **unit,
    )  # fmt: skip
    narrow(
        second.pivots, second.counts, second.masses, peaks, first.state,
        second.pivots, second.counts, second.masses, second.state, found, extremes,
        num_units, *strides, units * PIVOTS, FIRST=False, **common, **unit,
    )  # fmt: skip
    _finish_kernel[(batch,)](
        *lines, references, peaks, first.state, second.state, found, extremes, thresholds,
        num_units, *strides, UNITS=units, BLOCK=_BLOCK, num_warps=_FINISH_WARPS,
        **common, **launch,
    )  # fmt: skip
    return thresholds


class _Round(NamedTuple):
    """What a round of narrowing measures, and what it makes of it."""

    pivots: torch.Tensor
    """float32 [batch, units, pivots]; the first round's are [batch, pivots]."""
    counts: torch.Tensor
    """int32 [batch, units, pivots]."""
    masses: torch.Tensor
    """float32 [batch, units, pivots]."""
    state: torch.Tensor
    """float32 [batch, 4]."""


@cache
def _scratch(
    batch: int, units: int, capacity: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, _Round, _Round]:
    """References, peaks, candidates, extremes and both rounds; no call needs what another left."""
    empty = partial(torch.empty, dtype=torch.float32, device=device)
    cells = (batch, units, PIVOTS)
    first, second = (
        _Round(empty(cells), empty(cells, dtype=torch.int32), empty(cells), empty(batch, STATE))
        for _ in range(2)
    )
    found, extremes = empty(batch, capacity), empty(batch, units, 2)
    return empty(batch), empty(batch, units), found, extremes, first, second
