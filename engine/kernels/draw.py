"""Drawing the next tokens, greedy and random rows together, in two launches.

The noise is that of `engine.sampling.gumbel`, bit for bit in its integers, without its table: a
token's word is mixed in registers, in less time than it could be loaded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_CHUNK = 2048
"""Tokens in a program: few enough that a single row fills the GPU."""
_LAST = tl.constexpr(0x7FFFFFFF)
"""Largest token id; x ^ _LAST counts from the end."""


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
def _exponential(bits):
    """-log1p(-u) of the same u as in `gumbel.gumbel_argmax`, as precise where it is small."""
    u = bits.to(tl.float32) * ((1 - 2.0**-24) * 2.0**-31) + 2.0**-32
    # Up to 1/4: 2 atanh(u / (2 - u)) as a series, as 1 - u would lose the last digits of u.
    s = u / (2 - u)
    q = s * s
    series = 2 * s * (1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9)))))
    return tl.where(u < 0.25, series, -tl.log(1 - u))


@triton.jit
def _draw_kernel(
    logits, rows, positions, temperatures, seeds, thresholds, best,
    logits_stride, temperature_stride, seed_stride,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write the best token of a chunk as (order of its score, -id), so that a maximum picks it."""
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
        score -= tl.log(_exponential(bits))
    score = tl.where(score == 0, 0.0, score)  # -0 ties with 0
    largest = tl.max(score)
    first = tl.min(tl.where((score == largest) & inside, token, _LAST))
    place = line * tl.num_programs(1) + chunk
    tl.store(best + place, (order(largest).to(tl.int64) << 32) | (first ^ _LAST))


@triton.jit
def _pick_kernel(best, token_ids, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    line = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, BLOCK)
    packed = tl.load(best + line * CHUNKS + chunk, mask=chunk < CHUNKS, other=-(2**63))
    tl.store(token_ids + line, (tl.max(packed) & _LAST) ^ _LAST)


def draw(
    logits: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    threshold: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw one token a line: the first of the largest logits, or from softmax(logits / T).

    NaN is never drawn; a line of nothing else gives token 0.

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
    chunks = triton.cdiv(vocab_size, _CHUNK)
    best = torch.empty((batch, chunks), dtype=torch.int64, device=logits.device)
    token_ids = torch.empty(batch, dtype=torch.int64, device=logits.device)
    # Without fused multiply-add the noise is rounded as on the CPU.
    _draw_kernel[(batch, chunks)](
        logits, rows, positions, temperature, seeds, threshold, best,
        logits.stride(0), temperature.stride(0), seeds.stride(0),
        VOCAB=vocab_size, CHUNK=_CHUNK, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    _pick_kernel[(batch,)](
        best, token_ids, CHUNKS=chunks, BLOCK=triton.next_power_of_2(chunks), num_warps=1
    )
    return token_ids
