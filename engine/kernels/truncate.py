"""Thresholds of min_p, top_k and top_p: exact, without a sort, one program a row.

A threshold is found by bisection over the logits' values: pass by pass over the row while many
tokens lie in the interval, then among those left, in registers. Radix selection halves the same
way (Alabi et al. 2012, "Fast k-Selection Algorithms for Graphics Processing Units"); bisection also
serves sums of probabilities.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.draw import order, scale_logits

_BLOCK = 8192
"""Tokens that a program reads at a time."""
_CAPACITY = 4096
"""Tokens among which it goes on in registers."""
_FIRST_DEPTH = tl.constexpr(12.0)
"""First guess of how far, in nats, the threshold lies below the largest logit."""
_NO_MASS = tl.constexpr(-104.0)
"""exp of less is 0 in float32."""


@triton.jit
def _unorder(key):
    """The inverse of `order`; keys are int64 so that their sums do not overflow."""
    key = key.to(tl.int32)
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _tile(line, start, temperature, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Scaled logits from `start` on; -inf beyond the vocabulary."""
    token = start + tl.arange(0, BLOCK)
    logits = tl.load(line + token, mask=token < VOCAB, other=float("-inf"))
    return scale_logits(logits, temperature)


@triton.jit
def _extremes(line, temperature, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    smallest = tl.full((BLOCK,), float("inf"), tl.float32)
    for start in range(0, VOCAB, BLOCK):
        x = _tile(line, start, temperature, VOCAB, BLOCK)
        inside = start + tl.arange(0, BLOCK) < VOCAB
        largest = tl.maximum(largest, x)
        smallest = tl.minimum(smallest, tl.where(inside, x, float("inf")))
    return tl.max(largest), tl.min(smallest)


@triton.jit
def _measure(
    line, temperature, largest, threshold,
    BY_MASS: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many tokens are not below the threshold, and their weight."""
    count = tl.zeros((BLOCK,), tl.int32)
    weight = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, VOCAB, BLOCK):
        x = _tile(line, start, temperature, VOCAB, BLOCK)
        kept = x >= threshold
        count += kept.to(tl.int32)
        if BY_MASS:
            weight += tl.where(kept, tl.exp(x - largest), 0.0)
    number = tl.sum(count)
    return number, tl.sum(weight) if BY_MASS else number.to(tl.float32)


@triton.jit
def _gather(
    line, temperature, low, high, found,
    CAPACITY: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the logits from `low` to below `high` to `found`; their number."""
    number = 0
    for start in range(0, VOCAB, BLOCK):
        x = _tile(line, start, temperature, VOCAB, BLOCK)
        inside = (x >= low) & ~(x >= high)  # `high` may be NaN, above all numbers
        inside &= start + tl.arange(0, BLOCK) < VOCAB
        place = number + tl.cumsum(inside.to(tl.int32), 0) - 1
        tl.store(found + place, x, mask=inside & (place < CAPACITY))
        number += tl.sum(inside.to(tl.int32))
    tl.debug_barrier()  # other threads will read them
    return number


@triton.jit
def _pivot(low, high, largest, turn):
    """Where to look next: a guess, then the middle of the values, and of the keys in between."""
    value = (_unorder(low) + _unorder(high - 1)) * 0.5
    value = tl.where(turn == 0, largest - _FIRST_DEPTH, value)
    key = order(value).to(tl.int64)
    is_inside = (key > low) & (key < high) & (turn % 3 != 2)
    return tl.where(is_inside, key, (low + high) >> 1)


@triton.jit
def _search(
    line, temperature, largest, low, number, target, found,
    BY_MASS: tl.constexpr, CAPACITY: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest threshold at which the weights of the tokens not below it reach the target.

    They must at `low`, which `number` tokens are not below. A token weighs its probability relative
    to the likeliest one, or 1.
    """
    low = order(low).to(tl.int64)
    high = order(largest).to(tl.int64) + 1
    number_above, weight_above, turn = number * 0, target * 0, 0
    while (number - number_above > CAPACITY) & (high - low > 1):
        middle = _pivot(low, high, largest, turn)
        at_middle, weight = _measure(
            line, temperature, largest, _unorder(middle), BY_MASS, VOCAB, BLOCK
        )
        enough = weight >= target
        low = tl.where(enough, middle, low)
        number = tl.where(enough, at_middle, number)
        high = tl.where(enough, high, middle)
        number_above = tl.where(enough, number_above, at_middle)
        weight_above = tl.where(enough, weight_above, weight)
        turn += 1
    if high - low > 1:
        number = _gather(
            line, temperature, _unorder(low), _unorder(high), found, CAPACITY, VOCAB, BLOCK
        )
        place = tl.arange(0, CAPACITY)
        x = tl.load(found + place, mask=place < number, other=float("-inf"))
        weights = tl.where(place < number, tl.exp(x - largest) if BY_MASS else 1.0, 0.0)
        while high - low > 1:
            middle = (low + high) >> 1
            weight = weight_above + tl.sum(tl.where(x >= _unorder(middle), weights, 0.0))
            low = tl.where(weight >= target, middle, low)
            high = tl.where(weight >= target, high, middle)
    return _unorder(low)


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
    by_rank = top_k < VOCAB
    threshold = tl.full((), float("-inf"), tl.float32)
    if (temperature > 0) & (by_rank | (top_p < 1) | (log_min_p > float("-inf"))):
        line = logits + place * logits_stride
        found += place * CAPACITY
        largest, smallest = _extremes(line, temperature, VOCAB, BLOCK)
        if log_min_p > float("-inf"):
            threshold = largest + log_min_p
        if by_rank:
            kth = _search(
                line, temperature, largest, smallest, tl.full((), VOCAB, tl.int32),
                top_k.to(tl.float32), found, False, CAPACITY, VOCAB, BLOCK,
            )  # fmt: skip
            threshold = tl.maximum(threshold, kth)
        if top_p < 1:
            low = tl.maximum(tl.maximum(threshold, largest + _NO_MASS), smallest)
            number, total = _measure(line, temperature, largest, low, True, VOCAB, BLOCK)
            nucleus = _search(
                line, temperature, largest, low, number, total * top_p,
                found, True, CAPACITY, VOCAB, BLOCK,
            )  # fmt: skip
            threshold = tl.maximum(threshold, nucleus)
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
        CAPACITY=_CAPACITY, VOCAB=vocab_size, BLOCK=_BLOCK, num_warps=32,
    )  # fmt: skip
    return thresholds
