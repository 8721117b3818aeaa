"""Drawing the next tokens, greedy and random rows together, in one launch.

The noise is that of `engine.sampling.gumbel`, bit for bit in its integers, without its table: a
token's word is mixed in registers, in less time than it could be loaded.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

_CHUNK = 2048
"""Tokens in a program: few enough that a single row fills the GPU."""
_LOG2 = tl.constexpr(0.6931471805599453 * 2.0**-23)
_LAST = tl.constexpr(0x7FFFFFFF)
"""Largest token id; x ^ _LAST counts from the end."""
_NONE = tl.constexpr(-(2**63))


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
def _mix64(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _half_mix32(x, key):
    """`mix32` up to its last shift, with a key inside."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    return ((x ^ (x >> 15)) + key) * 0xD35A2D97


@triton.jit
def _random_bits(token, seed, position):
    """31 random bits of (seed, position, token), int32: `gumbel.random_words`."""
    seed = _mix64(seed.to(tl.uint64, bitcast=True))
    key = _mix64(seed + position.to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15)
    word = _half_mix32((token + 1).to(tl.uint32), 0)
    word = word ^ (word >> 15) ^ key.to(tl.uint32)
    bits = _half_mix32(word, (key >> 32).to(tl.uint32)).to(tl.int32, bitcast=True)
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
def _draw_kernel(
    logits, rows, positions, temperatures, seeds, thresholds, token_ids, best, arrivals,
    logits_stride, temperature_stride, seed_stride,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    line, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = token < VOCAB
    row = tl.load(rows + line)
    temperature = tl.load(temperatures + row * temperature_stride)
    score = tl.load(logits + line * logits_stride + token, mask=inside, other=float("-inf"))
    score = scale_logits(score, tl.where(temperature > 0, temperature, 1.0))
    if temperature > 0:
        if thresholds is not None:
            score = tl.where(score < tl.load(thresholds + line), float("-inf"), score)
        seed = tl.load(seeds + row * seed_stride)
        bits = _random_bits(token, seed, tl.load(positions + line))
        score += _gumbel(bits)
    score = tl.where(score == 0, 0.0, score)  # -0 ties with 0
    largest = tl.max(score)
    first = tl.min(tl.where((score == largest) & inside, token, _LAST))
    # As (order of the score, id from the end) the best token of all chunks is a maximum.
    tl.atomic_max(best + line, (order(largest).to(tl.int64) << 32) | (first ^ _LAST))
    if tl.atomic_add(arrivals + line, 1) == tl.num_programs(1) - 1:
        packed = tl.atomic_xchg(best + line, _NONE)
        tl.store(token_ids + line, (packed & _LAST) ^ _LAST)
        tl.store(arrivals + line, 0)


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
    # Without fused multiply-add the noise is rounded as on the CPU.
    _draw_kernel[(batch, triton.cdiv(vocab_size, _CHUNK))](
        logits, rows, positions, temperature, seeds, threshold, token_ids, best, arrivals,
        logits.stride(0), temperature.stride(0), seeds.stride(0),
        VOCAB=vocab_size, CHUNK=_CHUNK, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return token_ids


@cache
def _scratch(batch: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The best token so far and the chunks done of each line; every launch leaves them so."""
    best = torch.full((batch,), _NONE.value, dtype=torch.int64, device=device)
    return best, torch.zeros(batch, dtype=torch.int32, device=device)
