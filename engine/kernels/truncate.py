"""Thresholds of min_p, top_k and top_p: exact, without a sort, one program a row.

The first pass over a row notes the largest logit of every lane (each _BLOCK-th token). Where these
alone weigh as much as needed is a lower bound of the threshold, and few more tokens than needed are
not below it. Bisection among those, in registers, ends the search; where they are too many, pass by
pass over the row before. Radix selection halves the same way (Alabi et al. 2012, "Fast k-Selection
Algorithms for Graphics Processing Units"); bisection also serves sums of probabilities. All this
looks at logits as they are, for their order remains when they are divided by the temperature.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.draw import order, scale_logits

_BLOCK = 8192
"""Tokens that a program reads at a time; more than _CAPACITY."""
_CAPACITY = 4096
"""Tokens among which it goes on in registers."""
_WARPS = 32
_LOG2_E = tl.constexpr(1.4426950408889634)
_NO_MASS = tl.constexpr(-104.0)
"""exp of less is 0 in float32."""
_LOWEST = tl.constexpr(-0x7F800001)
"""`order` of -inf."""


@triton.jit
def _key(logits, SHIFT: tl.constexpr):
    """Integers in the order of the logits, without the SHIFT last bits that their type lacks."""
    return order(tl.where(logits == 0, 0.0, logits)) >> SHIFT  # -0 ties with 0


@triton.jit
def _logit(key, SHIFT: tl.constexpr):
    """The inverse of `_key`."""
    bits = tl.where(key < 0, key ^ (0x7FFFFFFF >> SHIFT), key) << SHIFT
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _middle(low, high):
    return (low & high) + ((low ^ high) >> 1)  # a sum could overflow


@triton.jit
def _weigh(logits, largest, rate):
    """Probabilities over that of the largest logit, for the rate log2(e) / T; 1 for the rate 0."""
    return tl.where(rate > 0, tl.exp2((logits - largest) * rate), 1.0)


@triton.jit
def _select(keys, weights, low, high, target):
    """The largest key at which the weights of the keys not below it reach the target, or `low`."""
    while high > low + 1:
        middle = _middle(low, high)
        enough = tl.sum(tl.where(keys >= middle, weights, 0.0)) >= target
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def _reaching(threshold, high, temperature, SHIFT: tl.constexpr):
    """The smallest key whose logit / T reaches the threshold; that of `high` does."""
    low = (_LOWEST >> SHIFT) - 1
    while high > low + 1:
        middle = _middle(low, high)
        enough = scale_logits(_logit(middle, SHIFT), temperature) >= threshold
        low = tl.where(enough, low, middle)
        high = tl.where(enough, middle, high)
    return high


@triton.jit
def _tile(line, start, lane, VOCAB: tl.constexpr):
    """The lanes' logits from `start` on; -inf beyond the vocabulary."""
    token = start + lane
    return tl.load(line + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)


@triton.jit
def _lane_maxima(line, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    maxima = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in tl.range(0, VOCAB, BLOCK, loop_unroll_factor=4):
        x = _tile(line, start, tl.arange(0, BLOCK), VOCAB)
        maxima = tl.where(x > maxima, x, maxima)  # never NaN
    return maxima


@triton.jit
def _measure(line, low, high, largest, rate, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Each lane's number of logits from `low` to below `high`, and what all of them weigh."""
    counts = tl.zeros((BLOCK,), tl.int32)
    weights = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, VOCAB, BLOCK, loop_unroll_factor=4):
        x = _tile(line, start, tl.arange(0, BLOCK), VOCAB)
        inside = (x >= low) & ~(x >= high)  # `high` may be NaN, above all numbers
        counts += inside.to(tl.int32)
        if rate > 0:
            weights += tl.where(inside, _weigh(x, largest, rate), 0.0)
    return counts, tl.where(rate > 0, tl.sum(weights), tl.sum(counts).to(tl.float32))


@triton.jit
def _gather(
    line, low, high, counts, found, CAPACITY: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The logits from `low` to below `high`, `counts` of each lane; -inf in the other places."""
    place = (tl.cumsum(counts, 0) - counts)[None, :]
    # Loads of single tokens, as the stores are: else threads would first exchange what they read.
    lane = tl.max_contiguous(tl.arange(0, BLOCK)[None, :], [1, 1])
    for start in tl.range(0, VOCAB, BLOCK, loop_unroll_factor=4):
        x = _tile(line, start, lane, VOCAB)
        inside = (x >= low) & ~(x >= high)
        tl.store(found + place, x, mask=inside)
        place += inside.to(tl.int32)
    tl.debug_barrier()  # other threads will read them
    place = tl.arange(0, CAPACITY)
    return tl.load(found + place, mask=place < tl.sum(counts), other=float("-inf"))


@triton.jit
def _narrow(
    line, low, pivot, high, counts, target, largest, rate,
    SHIFT: tl.constexpr, CAPACITY: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Halve the interval, from `pivot` on, until at most CAPACITY tokens are left in it.

    The target is what those in the interval must weigh. One key with more tokens is left alone.
    """
    number = tl.sum(counts)
    while (number > CAPACITY) & (high > low + 1):
        at_pivot, weight = _measure(
            line, _logit(pivot, SHIFT), _logit(high, SHIFT), largest, rate, VOCAB, BLOCK
        )
        enough = weight >= target
        counts = tl.where(enough, at_pivot, counts - at_pivot)
        number = tl.sum(counts)
        target = tl.where(enough, target, target - weight)
        low = tl.where(enough, pivot, low)
        high = tl.where(enough, high, pivot)
        pivot = _middle(low, high)
    return low, high, counts, number, target


@triton.jit
def _lower_bound(lanes, low, high, target, largest, rate, SHIFT: tl.constexpr):
    """Where the lanes' maxima alone reach the target, or the smallest of them; above `low`."""
    COARSE: tl.constexpr = 16 - SHIFT
    keys = _key(lanes, 16)  # rounding down keeps it a lower bound
    weights = _weigh(lanes, largest, rate)
    bound = _select(keys, weights, tl.min(keys), ((high - 1) >> COARSE) + 1, target)
    return tl.maximum(bound << COARSE, low + 1)


@triton.jit
def _search(
    line, lanes, found, gathered, complete_from, low, target, largest, rate,
    SHIFT: tl.constexpr, CAPACITY: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest key from `low` on at which the tokens not below it weigh enough.

    Enough is the target: a number of tokens or, with a rate, a part of the mass that `low` leaves.
    `gathered` holds all tokens from `complete_from` on; both are returned anew.
    """
    top = _key(largest, SHIFT) + 1
    high = top
    if low >= complete_from:
        weights = _weigh(gathered, largest, rate)
        target *= tl.sum(tl.where(_key(gathered, SHIFT) >= low, weights, 0.0))
    else:
        counts = tl.full((BLOCK,), tl.cdiv(VOCAB, BLOCK), tl.int32)
        if rate > 0:
            counts, total = _measure(
                line, _logit(low, SHIFT), _logit(high, SHIFT), largest, rate, VOCAB, BLOCK
            )
            target *= total
        pivot = _lower_bound(lanes, low, high, target, largest, rate, SHIFT)
        low, high, counts, number, target = _narrow(
            line, low, pivot, high, counts, target, largest, rate,
            SHIFT, CAPACITY, VOCAB, BLOCK,
        )  # fmt: skip
        if number <= CAPACITY:
            gathered = _gather(
                line, _logit(low, SHIFT), _logit(high, SHIFT), counts, found, CAPACITY, VOCAB, BLOCK
            )
            complete_from = tl.where(high == top, low, top)
    weights = _weigh(gathered, largest, rate)
    low = _select(_key(gathered, SHIFT), weights, low, high, target)
    return low, gathered, complete_from


@triton.jit(do_not_specialize_on_alignment=["rows"])
def _threshold_kernel(
    logits, rows, temperatures, top_ks, top_ps, log_min_ps, found, thresholds,
    logits_stride, stride, top_k_stride,
    CAPACITY: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + place)
    temperature = tl.load(temperatures + row * stride)
    top_k = tl.load(top_ks + row * top_k_stride)
    top_p = tl.load(top_ps + row * stride)
    log_min_p = tl.load(log_min_ps + row * stride)
    threshold = tl.full((), float("-inf"), tl.float32)
    if (temperature > 0) & ((top_k < VOCAB) | (top_p < 1) | (log_min_p > float("-inf"))):
        SHIFT: tl.constexpr = 23 - logits.dtype.element_ty.fp_mantissa_width
        line = logits + place * logits_stride
        found += place * CAPACITY
        lanes = _lane_maxima(line, VOCAB, BLOCK)
        largest = tl.max(lanes)
        top = scale_logits(largest, temperature)
        if log_min_p > float("-inf"):
            threshold = top + log_min_p
        gathered = tl.full((CAPACITY,), float("-inf"), tl.float32)
        complete_from = _key(largest, SHIFT) + 1
        for by_mass in range(2):  # a loop is compiled but once
            if tl.where(by_mass == 1, top_p < 1, top_k < VOCAB):
                low, target = _LOWEST >> SHIFT, top_k.to(tl.float32)
                rate = tl.where(by_mass == 1, _LOG2_E / temperature, 0.0)
                if by_mass == 1:
                    floor = tl.maximum(threshold, top + _NO_MASS)
                    low = _reaching(floor, _key(largest, SHIFT), temperature, SHIFT)
                    target = top_p
                key, gathered, complete_from = _search(
                    line, lanes, found, gathered, complete_from, low, target, largest, rate,
                    SHIFT, CAPACITY, VOCAB, BLOCK,
                )  # fmt: skip
                threshold = tl.maximum(threshold, scale_logits(_logit(key, SHIFT), temperature))
    tl.store(thresholds + place, threshold)


def truncation_threshold(
    logits: torch.Tensor,
    rows: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    log_min_p: torch.Tensor,
) -> torch.Tensor:
    """The smallest logit / T that each line keeps; ties with it are kept.

    min_p comes first, then top_k, and top_p counts the mass of what these two leave.

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
    batch, vocab_size = logits.shape
    found = torch.empty((batch, _CAPACITY), dtype=torch.float32, device=logits.device)
    thresholds = torch.empty(batch, dtype=torch.float32, device=logits.device)
    _threshold_kernel[(batch,)](
        logits, rows, temperature, top_k, top_p, log_min_p, found, thresholds,
        logits.stride(0), temperature.stride(0), top_k.stride(0),
        CAPACITY=_CAPACITY, VOCAB=vocab_size, BLOCK=_BLOCK, num_warps=_WARPS,
    )  # fmt: skip
    return thresholds
