"""Narrowing where the thresholds of top_k and top_p lie, with several programs a row.

Sample selection (Alsuwaiyel 2001, "On Parallel Selection"; on GPUs: Ribizel and Anzt 2020,
"Parallel selection on GPUs"): a few order statistics of a sample serve as pivots, one pass counts
and weighs the tokens not below each, and those between the two pivots that enclose the threshold
are gathered. If they are still too many, a second pass looks at pivots in between.

A row is cut into units of a fixed size, whatever the batch is, and what they find is added up in
a fixed order: a row's threshold depends on the row alone.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels.draw import order, scale_logits, unorder

PIVOTS = 8
"""The code below adds up for so many."""
STATE = 4
"""Numbers of a state: what became of the row, candidates, what lies above, and the target."""
REFINED, GATHERED, GIVEN_UP = tl.constexpr(0.0), tl.constexpr(1.0), tl.constexpr(2.0)
_CLUSTER = tl.constexpr(16)
"""Neighbours in the sample: they share a sector of memory."""
_TOP_RANK = tl.constexpr(10.0)
"""A pivot in the sample for rows whose mass lies in tokens too rare for it."""
_NEGLIGIBLE = tl.constexpr(-40.0)
"""Nats below the likeliest token from where on all tokens of a vocabulary together do not count in
float32."""
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def is_nan(x):
    """Whether numbers are none."""
    return ~(x >= float("-inf"))


@triton.jit
def row_options(
    place, rows, temperatures, top_ks, top_ps, log_min_ps, stride, top_k_stride
):  # fmt: skip
    """Temperature, top_k, top_p and log(min_p) of a line."""
    row = tl.load(rows + place)
    temperature = tl.load(temperatures + row * stride)
    top_k = tl.load(top_ks + row * top_k_stride)
    return temperature, top_k, tl.load(top_ps + row * stride), tl.load(log_min_ps + row * stride)


@triton.jit
def weigh(x, reference, temperature):
    """Probability relative to that of a token with the logit `reference`."""
    return tl.exp2((x - reference) * (_LOG2_E / temperature))


@triton.jit
def _at_goals(key, weights, goals):
    """For each goal the largest value at which the weights not below it reach it; -inf if none.

    By radix selection, to the precision of bfloat16.
    """
    best = tl.full(goals.shape, -0x80000000, tl.int64)
    for bit in range(16):
        middle = best + (tl.full((), 0x80000000, tl.int64) >> bit)
        above = key[None, :] >= middle.to(tl.int32)[:, None]
        reached = tl.sum(tl.where(above, weights[None, :], 0.0), axis=1)
        best = tl.where(reached >= goals, middle, best)
    value = unorder(best.to(tl.int32))
    return tl.where(value >= float("-inf"), value, float("-inf"))


@triton.jit
def _expected_rank(x, reference, temperature, top_k, top_p, VOCAB: tl.constexpr):
    """Rank of the threshold in a sample, and its standard deviation."""
    size: tl.constexpr = x.shape[0]
    if top_k < VOCAB:
        share = top_k.to(tl.float32) / VOCAB
        rank = share * size
        deviation = tl.sqrt(rank * (1 - share))
    else:
        weights = weigh(x, reference, temperature)
        goal = tl.full((1,), 0.0, tl.float32) + tl.sum(weights) * top_p
        value = tl.max(_at_goals(order(x), weights, goal))
        is_above = x > value
        rank = tl.sum(is_above.to(tl.int32)).to(tl.float32)
        # Of (mass above) - top_p · (total mass), in ranks: over the weight of a token there.
        part = weights * tl.where(is_above, 1 - top_p, top_p)
        here = tl.maximum(weigh(value, reference, temperature), 1e-30)
        deviation = tl.sqrt(tl.sum(part * part)) / here
    return rank, deviation + 1


@triton.jit(do_not_specialize_on_alignment=["rows"])
def sample_kernel(
    logits, rows, temperatures, top_ks, top_ps, log_min_ps, references, pivots,
    logits_stride, stride, top_k_stride,
    VOCAB: tl.constexpr, SAMPLE: tl.constexpr, SPACING: tl.constexpr, PIVOTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Pivots of each line, around where the threshold is expected; the last one is -inf."""
    place = tl.program_id(0).to(tl.int64)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    temperature, top_k, top_p, _ = row_options(
        place, rows, temperatures, top_ks, top_ps, log_min_ps, stride, top_k_stride
    )
    if (temperature > 0) & ((top_k < VOCAB) | (top_p < 1)):
        index, pivot = tl.arange(0, SAMPLE), tl.arange(0, PIVOTS)
        token = index // _CLUSTER * SPACING + index % _CLUSTER
        x = tl.load(logits + place * logits_stride + token).to(tl.float32)
        x = tl.where(x >= float("-inf"), x, float("-inf"))
        largest = tl.max(x)
        reference = tl.where(tl.abs(largest) < float("inf"), largest, 0.0)
        tl.store(references + place, reference)
        rank, deviation = _expected_rank(x, reference, temperature, top_k, top_p, VOCAB)
        offset = pivot.to(tl.float32) - 2.5  # in standard deviations: ±0.5, ±1.5 and ±3.5
        offset = tl.where(tl.abs(offset) > 2, offset * 1.4, offset)
        wanted = tl.where(pivot == 6, _TOP_RANK, rank + deviation * offset)
        wanted = tl.minimum(tl.maximum(wanted, 0.0), SAMPLE - 1.0)
        value = _at_goals(order(x), tl.full(x.shape, 1.0, tl.float32), wanted + 1)
        tl.store(pivots + place * PIVOTS + pivot, tl.where(pivot == 7, float("-inf"), value))


@triton.jit
def _unit(line, unit, VOCAB: tl.constexpr, UNIT: tl.constexpr):
    """The logits of a unit; NaN beyond the vocabulary, which is not above anything."""
    token = unit * UNIT + tl.arange(0, UNIT)
    return tl.load(line + token, mask=token < VOCAB, other=float("nan")).to(tl.float32)


@triton.jit
def _above(x, value, pivot, VECTOR: tl.constexpr, THREADS: tl.constexpr):
    """Each thread's sum of the values of its tokens not below a pivot."""
    kept = tl.where(x >= tl.load(pivot), value, tl.zeros_like(value))
    kept = tl.reshape(kept, (x.shape[0] // (VECTOR * THREADS), THREADS, VECTOR))
    return tl.sum(tl.sum(kept, axis=2), axis=0)


@triton.jit
def _above_each(x, value, pivots, VECTOR: tl.constexpr, THREADS: tl.constexpr):
    """The sums of all threads for all pivots; `join` interleaves, hence the order."""
    a = _above(x, value, pivots, VECTOR, THREADS)
    b = _above(x, value, pivots + 4, VECTOR, THREADS)
    c = _above(x, value, pivots + 2, VECTOR, THREADS)
    d = _above(x, value, pivots + 6, VECTOR, THREADS)
    e = _above(x, value, pivots + 1, VECTOR, THREADS)
    f = _above(x, value, pivots + 5, VECTOR, THREADS)
    g = _above(x, value, pivots + 3, VECTOR, THREADS)
    h = _above(x, value, pivots + 7, VECTOR, THREADS)
    even = tl.join(tl.join(a, b), tl.join(c, d))
    odd = tl.join(tl.join(e, f), tl.join(g, h))
    return tl.sum(tl.reshape(tl.join(even, odd), (THREADS, 8)), axis=0)


@triton.jit
def _measure(
    x, pivots, reference, temperature, counts, masses, by_mass,
    PIVOTS: tl.constexpr, VECTOR: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Store how many tokens of a unit are not below each pivot and, by mass, their weight."""
    pivot = tl.arange(0, PIVOTS)
    one = tl.full(x.shape, 1, tl.int32)
    tl.store(counts + pivot, _above_each(x, one, pivots, VECTOR, THREADS))
    if by_mass:
        weights = weigh(x, reference, temperature)
        tl.store(masses + pivot, _above_each(x, weights, pivots, VECTOR, THREADS))


@triton.jit(do_not_specialize_on_alignment=["rows"])
def measure_kernel(
    logits, rows, temperatures, top_ks, top_ps, log_min_ps,
    references, pivots, counts, masses, peaks, logits_stride, stride, top_k_stride,
    VOCAB: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr, PIVOTS: tl.constexpr,
    VECTOR: tl.constexpr, THREADS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """What the sample's pivots have above them in each unit, and the unit's largest logit."""
    unit, place = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    temperature, top_k, top_p, log_min_p = row_options(
        place, rows, temperatures, top_ks, top_ps, log_min_ps, stride, top_k_stride
    )
    searches = (top_k < VOCAB) | (top_p < 1)
    if (temperature > 0) & (searches | (log_min_p > float("-inf"))):
        x = _unit(logits + place * logits_stride, unit, VOCAB, UNIT)
        mine = place * UNITS + unit
        tl.store(peaks + mine, tl.max(tl.where(x >= float("-inf"), x, float("-inf"))))
        if searches:
            _measure(
                x, pivots + place * PIVOTS, tl.load(references + place), temperature,
                counts + mine * PIVOTS, masses + mine * PIVOTS, top_k >= VOCAB,
                PIVOTS, VECTOR, THREADS,
            )  # fmt: skip


@triton.jit
def largest_logit(peaks, place, num_units, UNITS: tl.constexpr):
    """Of a line, NaN aside."""
    unit = tl.arange(0, UNITS)
    peak = tl.load(peaks + place * UNITS + unit, mask=unit < num_units, other=float("-inf"))
    return tl.max(peak)


@triton.jit
def _is_enough(
    number, mass, pivot, largest, target, temperature, top_k, log_min_p, VOCAB: tl.constexpr
):  # fmt: skip
    """For each pivot whether the threshold cannot be below it.

    By mass, without a target as well, that is so where all below a pivot is negligible or dropped
    by min_p.
    """
    if top_k < VOCAB:
        enough = number >= top_k
    else:
        floor = scale_logits(largest, temperature) + tl.maximum(log_min_p, _NEGLIGIBLE)
        goal = tl.where(target > 0, target, float("nan"))  # which nothing reaches
        enough = (scale_logits(pivot, temperature) <= floor) | (mass >= goal)
    return enough


@triton.jit
def _bracket(count, mass, pivot, enough, by_rank, CAPACITY: tl.constexpr):
    """The pivots that enclose the threshold, and what lies between and above them.

    Args:
        count: of each unit, not below each pivot.

    Returns:
        The lower pivot; the upper one, NaN if there is none or if all above the lower one are few
        enough to be candidates; candidates of each unit; number or mass above them.
    """
    low = tl.max(tl.where(enough, pivot, float("-inf")))
    high = tl.min(tl.where(enough, float("inf"), pivot))
    from_low = tl.max(tl.where((pivot == low)[None, :], count, 0), axis=1)
    is_open = (tl.sum(from_low) <= CAPACITY) | (tl.min(enough.to(tl.int32)) == 1)
    high = tl.where(is_open, float("nan"), high)
    from_high = tl.max(tl.where((pivot == high)[None, :], count, 0), axis=1)
    mass_above = tl.max(tl.where(pivot == high, mass, 0.0))
    above = tl.where(by_rank, tl.sum(from_high).to(tl.float32), mass_above)
    return low, high, from_low - from_high, above


@triton.jit
def _gather(x, low, high, found, first, CAPACITY: tl.constexpr):
    """Write the logits from `low` to below `high`, or to the end if that is NaN, to `found`."""
    inside = (x >= low) & ~(x >= high)
    place = first + tl.cumsum(inside.to(tl.int32), 0) - 1
    tl.store(found + place, x, mask=inside & (place < CAPACITY))


@triton.jit
def _pivots_between(low, high, largest, PIVOTS: tl.constexpr):
    """Evenly spaced from the upper one on, or the largest logit, to the lower one."""
    step = tl.arange(0, PIVOTS)
    top = tl.where(is_nan(high), largest, high)
    bottom = tl.maximum(low, 2 * top - largest - 1)  # a guess if `low` is -inf
    between = top + (bottom - top) * (step.to(tl.float32) / (PIVOTS - 1))
    is_last = (step == PIVOTS - 1) | is_nan(between)  # NaN comes of infinite logits
    return tl.where(is_last, low, between)


@triton.jit
def _target(state, mass, by_rank, top_p, log_min_p, FIRST: tl.constexpr):
    """The mass to be reached; 0 if it is not known before the candidates are.

    The sample's pivots have one of -inf among them, which the total is above. Min_p drops some of
    it; and if it is infinite, so is much else.
    """
    if FIRST:
        total = tl.max(mass)
        is_known = (by_rank == 0) & (log_min_p == float("-inf"))
        is_known &= (total > 1e-20) & (total < float("inf"))
        target = tl.where(is_known, total * top_p, 0.0)
    else:
        target = tl.load(state + 3)
    return target


@triton.jit
def _store_state(state, status, number, above, target):
    tl.store(state, status)
    tl.store(state + 1, number.to(tl.float32))
    tl.store(state + 2, above)
    tl.store(state + 3, target)


@triton.jit(do_not_specialize=["num_units"], do_not_specialize_on_alignment=["rows"])
def narrow_kernel(
    logits, rows, temperatures, top_ks, top_ps, log_min_ps,
    references, pivots, counts, masses, peaks, state,
    next_pivots, next_counts, next_masses, next_state, found, extremes,
    num_units, logits_stride, stride, top_k_stride, pivot_stride,
    FIRST: tl.constexpr, CAPACITY: tl.constexpr,
    VOCAB: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr, PIVOTS: tl.constexpr,
    STATE: tl.constexpr, VECTOR: tl.constexpr, THREADS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Gather the tokens between two pivots; if they are too many, measure at others in between.

    The second round notes their extremes instead: they may all be the same.
    """
    this, place = tl.program_id(0), tl.program_id(1).to(tl.int64)
    state += place * STATE
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    temperature, top_k, top_p, log_min_p = row_options(
        place, rows, temperatures, top_ks, top_ps, log_min_ps, stride, top_k_stride
    )
    by_rank = top_k < VOCAB
    searches = (temperature > 0) & (by_rank | (top_p < 1))
    if not FIRST:
        searches &= tl.load(state) == REFINED
    if searches:
        unit, pivot = tl.arange(0, UNITS), tl.arange(0, PIVOTS)
        cell = (place * UNITS + unit)[:, None] * PIVOTS + pivot[None, :]
        exists = (unit < num_units)[:, None]
        count = tl.load(counts + cell, mask=exists, other=0)
        mass = tl.sum(tl.load(masses + cell, mask=exists, other=0.0), axis=0)
        value = tl.load(pivots + place * pivot_stride + pivot)
        largest = largest_logit(peaks, place, num_units, UNITS)
        target = _target(state, mass, by_rank, top_p, log_min_p, FIRST)
        enough = _is_enough(
            tl.sum(count, axis=0), mass, value, largest, target,
            temperature, top_k, log_min_p, VOCAB,
        )  # fmt: skip
        low, high, inside, above = _bracket(count, mass, value, enough, by_rank, CAPACITY)
        number = tl.sum(inside)
        gathers = (number <= CAPACITY) & (is_nan(high) | suffices(by_rank, top_p, target))
        if this == 0:
            failed = REFINED if FIRST else GIVEN_UP
            status = tl.where(gathers, GATHERED, failed)
            _store_state(next_state + place * STATE, status, number, above, target)
        mine = place * UNITS + this
        if ~gathers | (tl.sum(tl.where(unit == this, inside, 0)) > 0):
            x = _unit(logits + place * logits_stride, this, VOCAB, UNIT)
            if gathers:
                first = tl.sum(tl.where(unit < this, inside, 0))
                _gather(x, low, high, found + place * CAPACITY, first, CAPACITY)
            elif FIRST:
                next_pivots += mine * PIVOTS
                tl.store(next_pivots + pivot, _pivots_between(low, high, largest, PIVOTS))
                tl.debug_barrier()  # other threads will read them
                _measure(
                    x, next_pivots, tl.load(references + place), temperature,
                    next_counts + mine * PIVOTS, next_masses + mine * PIVOTS, by_rank == 0,
                    PIVOTS, VECTOR, THREADS,
                )  # fmt: skip
            else:
                is_inside = (x >= low) & ~(x >= high)
                tl.store(extremes + mine * 2, tl.max(tl.where(is_inside, x, float("-inf"))))
                tl.store(extremes + mine * 2 + 1, tl.min(tl.where(is_inside, x, float("inf"))))


@triton.jit
def suffices(by_rank, top_p, target):
    """Whether the threshold follows from an interval that holds it, without what lies above."""
    return tl.where(by_rank, top_p >= 1, target > 0)
