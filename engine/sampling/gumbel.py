"""Gumbel noise from a counter-based hash, so that a draw depends on (seed, position) alone.

Adding standard Gumbel noise to log-probabilities and taking the largest draws from them (Gumbel
1954; Maddison et al. 2014, "A* Sampling", arXiv:1411.0030), which needs no softmax. The noise is a
pure function of (seed, position, token id) in integer arithmetic: neither the batch, the row, a
preemption nor another machine changes it. (Only the last bit of the two logarithms may differ
between kinds of device.)

The mixers are finalisers with published avalanche measurements: for 32 bits Ettinger and Wellons'
"lowbias32" (github.com/skeeto/hash-prospector, constants of 2020), for 64 bits the finaliser of
SplitMix64 (Steele, Lea, Flood 2014, "Fast Splittable Pseudorandom Number Generators", variant 13 of
Stafford's constants).
"""

from __future__ import annotations

import torch

_M32_A = 0x21F0AAAD
_M32_B = 0xD35A2D97 - 2**32
_M64_A = 0xBF58476D1CE4E5B9 - 2**64
_M64_B = 0x94D049BB133111EB - 2**64
_GOLDEN64 = 0x9E3779B97F4A7C15 - 2**64


def _xorshift_(x: torch.Tensor, shift: int, bits: int) -> torch.Tensor:
    """`x ^= x >> shift` in place with a logical shift, which torch has not for signed integers."""
    return x.bitwise_xor_(x.bitwise_right_shift(shift).bitwise_and_((1 << (bits - shift)) - 1))


def _mix64(x: torch.Tensor) -> torch.Tensor:
    x = _xorshift_(x.clone(), 30, 64).mul_(_M64_A)
    return _xorshift_(_xorshift_(x, 27, 64).mul_(_M64_B), 31, 64)


def _mix32(x: torch.Tensor) -> torch.Tensor:
    x = _xorshift_(x.clone(), 16, 32).mul_(_M32_A)
    return _xorshift_(_xorshift_(x, 15, 32).mul_(_M32_B), 15, 32)


def token_words(vocab_size: int, device: torch.device) -> torch.Tensor:
    """A well-mixed word for each token id, int32 [vocab]; computed once."""
    return _mix32(torch.arange(1, vocab_size + 1, dtype=torch.int32, device=device))


def stream_keys(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Keys of the noise of (seed, position) pairs.

    Args:
        seeds: int64 [rows].
        positions: int64 [rows], indices in the sequence of the tokens to draw.

    Returns:
        int32 [rows, 2].
    """
    return _mix64(_mix64(seeds) + positions * _GOLDEN64).view(torch.int32).view(-1, 2)


def random_words(words: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """31 random bits for every (row, token).

    Args:
        words: `token_words`, int32 [vocab].
        keys: `stream_keys`, int32 [rows, 2].

    Returns:
        int32 [rows, vocab], from 0 to 2³¹ - 1.
    """
    # One round of the mixer with half of the key before it and half inside.
    x = torch.bitwise_xor(words, keys[:, :1])
    scratch = torch.empty_like(x)
    torch.bitwise_right_shift(x, 16, out=scratch)
    x.bitwise_xor_(scratch.bitwise_and_(0xFFFF)).mul_(_M32_A)
    torch.bitwise_right_shift(x, 15, out=scratch)
    x.bitwise_xor_(scratch.bitwise_and_(0x1FFFF)).add_(keys[:, 1:]).mul_(_M32_B)
    # An arithmetic shift folds the sign into the other bits and clears it: 31 bits are left.
    torch.bitwise_right_shift(x, 15, out=scratch)
    return x.bitwise_xor_(scratch)


def gumbel_argmax(logits: torch.Tensor, words: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Draw one token a row from softmax(logits).

    Args:
        logits: float32 [rows, vocab]; -inf for tokens that must not be drawn.
        words: `token_words`, int32 [vocab].
        keys: `stream_keys`, int32 [rows, 2].

    Returns:
        int64 [rows].
    """
    bits = random_words(words, keys)
    # Gumbel noise is -log(E) with E exponential. E = -log1p(-u) keeps its precision where it is
    # small, that is where tokens win. u lies in [2⁻³², 1 - 2⁻²⁴], so the noise is finite.
    exponential = bits.float().mul_(-(1 - 2.0**-24) * 2.0**-31)
    exponential.sub_(2.0**-32).log1p_().neg_()
    return torch.sub(logits, exponential.log_(), out=exponential).argmax(dim=-1)
