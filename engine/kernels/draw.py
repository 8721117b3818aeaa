"""Drawing the next tokens, greedy and random rows together, in one launch.

The noise is that of `engine.sampling.gumbel`, bit for bit in its integers. Its two logarithms would
be most of the work, so they are computed only for tokens that an upper bound of their score lets
win: a few of a line.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from engine.sampling.gumbel import token_words

_TILE = 512
"""Tokens that a program looks at together; it is one warp, which never waits for another."""
_LINES = 4
"""Lines of a tile in large batches: they share the tokens' words, which outweigh the logits."""
LARGE_BATCH = 64
"""From here on lines share; before, more programs a line end sooner."""
_PROGRAMS = 2048
"""About what a large GPU holds at once; more would only know less of the best score so far."""
_LOG2 = tl.constexpr(0.6931471805599453 * 2.0**-23)
_BOUND_BASE = tl.constexpr(0.6931471805599453 * (31 + 127))
_LAST = tl.constexpr(0x7FFFFFFF)
"""Largest token id; x ^ _LAST counts from the end."""
_NONE = tl.constexpr((-0x7F800001 << 32) | 0x7FFFFFFF)
"""Token 0 with the score -inf, as `_settle` packs it."""


@triton.jit
def scale_logits(logits, temperature):
    """Logits / temperature in float32, rounded as torch does; NaN counts as -inf."""
    scaled = tl.div_rn(logits.to(tl.float32), temperature)
    return tl.where(scaled >= float("-inf"), scaled, float("-inf"))


@triton.jit
def order(value):
    """Integers (int32) in the order of the float32 values; -0 comes right below 0."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def unorder(key):
    """The float32 value of an int32 of `order`."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _mix64(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _stream_keys(seed, position):
    """`gumbel.stream_keys`, each half moved as far as it goes: what `_random_bits` takes."""
    seed = _mix64(seed.to(tl.uint64, bitcast=True))
    key = _mix64(seed + position.to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15)
    low = key.to(tl.uint32)
    return low ^ (low >> 16), (key >> 32).to(tl.uint32) * 0xD35A2D97


@triton.jit
def _random_bits(word, key, addend):
    """31 random bits of (seed, position, token), int32: `gumbel.random_words`."""
    x = (word.to(tl.uint32, bitcast=True) ^ key) * 0x21F0AAAD
    bits = ((x ^ (x >> 15)) * 0xD35A2D97 + addend).to(tl.int32, bitcast=True)
    return bits ^ (bits >> 15)


@triton.jit
def _log1p(f):
    """log(1 + f) for f from -1/4 to 1/2: f + f² P(f), P minimax, within 1e-7 of the result."""
    p = tl.fma(f, 0.05413185432553291, -0.12067317217588425)
    p = tl.fma(p, f, 0.14983916282653809)
    p = tl.fma(p, f, -0.1682281792163849)
    p = tl.fma(p, f, 0.19977077841758728)
    p = tl.fma(p, f, -0.24993441998958588)
    p = tl.fma(p, f, 0.3333354890346527)
    p = tl.fma(p, f, -0.5000005960464478)
    return tl.fma(f * f, p, f)


@triton.jit
def _exponent(x):
    """The k for which x / 2^k is from 3/4 to 3/2, in place as in float32: k · 2²³, int32."""
    return (x.to(tl.int32, bitcast=True) - 0x3F400000) & -0x800000


@triton.jit
def _gumbel(bits):
    """-log(-log1p(-u)) of the same u as in `gumbel.gumbel_argmax`.

    Both logarithms are `_log1p` beside a multiple of log 2: no special cases, and the same result
    in the interpreter but for the last bits.
    """
    u = bits.to(tl.float32) * ((1 - 2.0**-24) * 2.0**-31) + 2.0**-32
    k = _exponent(1 - u)
    scale = (0x3F800000 - k).to(tl.float32, bitcast=True)
    # (1 - u) · scale - 1, but where u is small none of its digits are lost.
    exponential = -_log1p((scale - 1) - u * scale) - k.to(tl.float32) * _LOG2
    k = _exponent(exponential)
    mantissa = (exponential.to(tl.int32, bitcast=True) - k).to(tl.float32, bitcast=True)
    return -_log1p(mantissa - 1) - k.to(tl.float32) * _LOG2


@triton.jit
def _noise_bound(bits, step, base):
    """At least the noise of these bits less 1e-4, and rarely more than 0.07 + u above it.

    The noise is -log(-log1p(-u)) <= -log(u), and u >= f 2^-31 within 1e-6 for f = float(bits). A
    float's bits, read as an integer I, are a piecewise linear logarithm (Mitchell 1962, "Computer
    Multiplication and Division Using Binary Logarithms"): f = 2^k (1 + m), with m from 0 to 1, has
    I = 2^23 (127 + k + m), and m <= log2(1 + m) <= m + 0.0861. So -log(u) is at most
    log(2) (31 + 127 - I 2^-23), here `base + I · step`, and rounding takes less than 5e-5 off it.
    Both are 0 for lines without noise.
    """
    logarithm = bits.to(tl.float32).to(tl.int32, bitcast=True)
    return tl.fma(logarithm.to(tl.float32), step, base)


@triton.jit
def _bar(score, noisy):
    """What upper bounds must exceed for a token to reach the score: a little less than it.

    A bound x · (1 / T) + `_noise_bound` falls short of x / T + noise, as these are rounded, by less
    than 2^-20 |x / T| + 2e-4. Of a token that reaches the score, x / T is either below twice the
    score's size + 64, and this margin is larger, or it exceeds the score by itself. Bounds of
    greedy lines are their scores.
    """
    size = tl.minimum(tl.abs(score), 1e30)  # infinity has no margin
    return tl.where(noisy, score - tl.fma(size, 2.0**-18, 2.0**-10), score)


@triton.jit
def _settle(
    logits, bits, first, top, best, line, temperature, threshold, WIDTH: tl.constexpr
):  # fmt: skip
    """Score the tokens of a tile exactly, note the best, and raise top and bar of the lines."""
    noisy = temperature > 0
    score = scale_logits(logits, tl.where(noisy, temperature, 1.0)[:, None])
    drawn = tl.where(score < threshold[:, None], float("-inf"), score) + _gumbel(bits)
    score = tl.where(noisy[:, None], drawn, score)
    score = tl.where(score == 0, 0.0, score)  # -0 ties with 0
    # As (order of the score, id from the end) the best token is a maximum.
    token = first + tl.arange(0, WIDTH)[None, :]
    packed = (order(score).to(tl.int64) << 32) | (token ^ _LAST)
    tl.atomic_max(best + line, tl.max(packed, axis=1), sem="relaxed")
    top = tl.maximum(top, tl.max(score, axis=1))
    # Below what other programs have found none can win; a tie with it can, if its id is smaller.
    shared = (tl.load(best + line, volatile=True) >> 32).to(tl.int32) - 1
    shared = unorder(tl.maximum(shared, -0x7F800001))
    return top, tl.maximum(_bar(top, noisy), _bar(shared, noisy))


@triton.jit(
    do_not_specialize=["batch", "tiles"], do_not_specialize_on_alignment=["rows", "positions"]
)
def _draw_kernel(
    logits, words, rows, positions, temperatures, seeds, thresholds, token_ids, best, arrivals,
    batch, tiles, logits_stride, temperature_stride, seed_stride,
    VOCAB: tl.constexpr, LINES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * LINES + tl.arange(0, LINES)
    line = tl.minimum(place, batch - 1).to(tl.int64)
    row = tl.load(rows + line)
    temperature = tl.load(temperatures + row * temperature_stride)
    noisy = temperature > 0
    any_noisy = tl.max(noisy.to(tl.int32)) > 0
    key, addend = _stream_keys(tl.load(seeds + row * seed_stride), tl.load(positions + line))
    addend = tl.where(noisy, addend, 0)  # a plain product would be moved back into the loop
    threshold = tl.full((LINES,), float("-inf"), tl.float32)
    if thresholds is not None:
        threshold = tl.where(noisy, tl.load(thresholds + line), threshold)
    cut = _bar(threshold, noisy)[:, None]
    scale = 1.0 / tl.where(noisy, temperature, 1.0)[:, None]
    step = tl.where(noisy, -_LOG2, 0.0)[:, None]
    base = tl.where(noisy, _BOUND_BASE, 0.0)[:, None]
    top = tl.full((LINES,), float("-inf"), tl.float32)
    bar = top
    start = tl.program_id(1) * tiles * WIDTH
    # Four neighbours a thread: so words and logits of any type lie alike in registers.
    column = tl.max_contiguous(tl.arange(0, WIDTH)[None, :], [1, 4])
    source = logits + line[:, None] * logits_stride + column
    following = tl.load(source + start, mask=start + column < VOCAB, other=float("-inf"))
    for first in range(start, tl.minimum(start + tiles * WIDTH, VOCAB), WIDTH):
        tile = following
        upper = tile.to(tl.float32)
        bits = tl.zeros((LINES, WIDTH), tl.int32)
        word = tl.load(words + (first + column))
        rest = first + WIDTH + column < VOCAB
        following = tl.load(source + (first + WIDTH), mask=rest, other=float("-inf"))
        if thresholds is not None:
            upper = tl.where(upper * scale < cut, float("-inf"), upper)
        if any_noisy:
            bits = _random_bits(word, key[:, None], addend[:, None])
            upper = tl.fma(upper, scale, _noise_bound(bits, step, base))
        peaks = tl.max(tl.reshape(upper, (LINES, WIDTH // 4, 4)), axis=2)
        if tl.max((peaks > bar[:, None]).to(tl.int32)) > 0:
            top, bar = _settle(
                tile, bits, first, top, best, line, temperature, threshold, WIDTH
            )  # fmt: skip
    tl.debug_barrier()  # what all threads have found comes before the arrival
    if tl.atomic_add(arrivals + tl.program_id(0), 1) == tl.num_programs(1) - 1:
        packed = tl.atomic_xchg(best + line, _NONE, mask=place < batch)
        tl.store(token_ids + line, (packed & _LAST) ^ _LAST, mask=place < batch)
        tl.store(arrivals + tl.program_id(0), 0)


def draw(
    logits: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    threshold: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw one token a line: the first of the largest logits, or from softmax(logits / T).

    NaN is never drawn; a line of nothing else gives token 0. Calls may not overlap on one device:
    they share scratch memory.

    Args:
        logits: bfloat16, float16 or float32 [batch, vocab]; lines may lie apart, tokens may not.
        rows: the row of each line, int64 [batch].
        positions: index in its sequence of the token that each line draws, int64 [batch].
        temperature: of each row, float32 [rows, 1]; 0 means greedy.
        seeds: of each row, int64 [rows, 1].
        threshold: logits / T below it are not drawn, float32 [batch]; greedy lines ignore it.

    Returns:
        int64 [batch].
    """
    batch, vocab_size = logits.shape
    token_ids = torch.empty(batch, dtype=torch.int64, device=logits.device)
    best, arrivals = _scratch(triton.next_power_of_2(batch), logits.device)
    lines = _LINES if batch >= LARGE_BATCH else 1
    width = _TILE // lines
    groups, tiles = triton.cdiv(batch, lines), triton.cdiv(vocab_size, width)
    tiles_each = triton.cdiv(tiles, max(1, _PROGRAMS // groups))
    # Without fused multiply-add the noise is rounded as on the CPU.
    _draw_kernel[(groups, triton.cdiv(tiles, tiles_each))](
        logits, _words(vocab_size, logits.device), rows, positions, temperature, seeds, threshold,
        token_ids, best, arrivals, batch, tiles_each,
        logits.stride(0), temperature.stride(0), seeds.stride(0),
        VOCAB=vocab_size, LINES=lines, WIDTH=width, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return token_ids


@cache
def _words(vocab_size: int, device: torch.device) -> torch.Tensor:
    """The tokens' words, int32 [vocab], with the first step of `_random_bits` done."""
    words = token_words(triton.cdiv(vocab_size, _TILE) * _TILE, device)
    return words ^ (words >> 16 & 0xFFFF)


@cache
def _scratch(batch: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The best token so far of each line and the programs done; every launch leaves them so."""
    best = torch.full((batch,), _NONE.value, dtype=torch.int64, device=device)
    return best, torch.zeros(batch, dtype=torch.int32, device=device)
