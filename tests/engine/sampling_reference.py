"""A plain float64 sampler to compare with: one row at a time, NumPy and Python integers only."""

import math
from collections import Counter

import numpy as np
import torch

from engine.sampling import Sampler
from engine.sampling.rows import Batch
from engine.sampling_params import SamplingParams
from engine.step import NewRow

MASK32, MASK64 = 2**32 - 1, 2**64 - 1


def new_row(row, params, token_ids=(), num_prompt_tokens=None):
    token_ids = list(token_ids)
    if num_prompt_tokens is None:
        num_prompt_tokens = len(token_ids)
    return NewRow(row, f"request-{row}", params, token_ids, num_prompt_tokens)


def params(**fields):
    return SamplingParams(**{"seed": 0, **fields})


def sample(sampler, logits, rows, positions):
    """What the sampler draws for the lines of `logits`."""
    return sampler.sample(logits, Batch(rows, positions, logits.device))


def draw(logits, options, positions=None, eos=(), **row_options):
    """Token ids of rows 0 … with one SamplingParams each."""
    sampler = Sampler(len(options), logits.shape[1], torch.device("cpu"), eos)
    for row, each in enumerate(options):
        sampler.add_row(new_row(row, each, **row_options))
    rows = list(range(len(options)))
    positions = positions or [0] * len(rows)
    return sample(sampler, logits.clone(), rows, positions).token_ids.tolist()


def edited_logits(logits, params, token_ids, num_prompt, eos=()):
    """Logits after bias, minimum length, penalties, allowed tokens and bad words."""
    x = torch.as_tensor(logits).double().numpy().copy()
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    if len(token_ids) - num_prompt < params.min_tokens:
        x[list({*params.stop_token_ids, *(() if params.ignore_eos else eos)})] = -np.inf
    for token in set(token_ids):
        x[token] *= params.repetition_penalty ** (-1 if x[token] > 0 else 1)
    for token, count in Counter(token_ids[num_prompt:]).items():
        x[token] -= params.frequency_penalty * count + params.presence_penalty
    if params.allowed_token_ids is not None:
        x[list(set(range(len(x))) - set(params.allowed_token_ids))] = -np.inf
    for *before, last in params.bad_words_token_ids:
        if token_ids[num_prompt:][len(token_ids) - num_prompt - len(before) :] == before:
            x[last] = -np.inf
    return x


def kept_tokens(x, params):
    """Which tokens min_p, top_k and top_p keep; `x` after temperature. Ties are kept."""
    p = np.exp(x - x.max())
    kept = p >= params.min_p
    if 0 < params.top_k < len(x):
        kept &= x >= np.sort(x)[-params.top_k]
    if params.top_p < 1:
        order = np.argsort(-x)
        mass = np.cumsum(np.where(kept, p, 0)[order])
        last = int(np.searchsorted(mass, params.top_p * mass[-1]))
        kept &= x >= x[order[last]]
    return kept


def _mix64(x):
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def _mix32(x, key=0):
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & MASK32
    x = (((x ^ (x >> 15)) + key) * 0xD35A2D97) & MASK32
    return x ^ (x >> 15)


def noise_bits(seed, position, token):
    """31 random bits, in Python integers."""
    key = _mix64((_mix64(seed & MASK64) + position * 0x9E3779B97F4A7C15) & MASK64)
    x = (_mix32(token + 1) ^ (key & MASK32)) & MASK32
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & MASK32
    x = (((x ^ (x >> 15)) + (key >> 32)) * 0xD35A2D97) & MASK32
    fold = 2**32 - 2**15 if x >> 31 else 0  # an arithmetic shift fills with the sign
    return x ^ ((x >> 15) | (fold & ~(2**17 - 1) & MASK32))


def scores(logits, params, token_ids, num_prompt, eos=()):
    """What the largest of decides: logits for greedy rows, perturbed ones for others."""
    x = edited_logits(logits, params, token_ids, num_prompt, eos)
    if params.greedy:
        return x
    x /= params.temperature
    bits = [noise_bits(params.seed, len(token_ids), token) for token in range(len(x))]
    u = np.array(bits) * (1 - 2.0**-24) * 2.0**-31 + 2.0**-32
    return np.where(kept_tokens(x, params), x - np.log(-np.log1p(-u)), -np.inf)


def chi_square_limit(freedom, deviations=5.0):
    """Far tail of the chi-square distribution (Wilson and Hilferty 1931)."""
    return freedom * (1 - 2 / (9 * freedom) + deviations * math.sqrt(2 / (9 * freedom))) ** 3


def chi_square(observed, expected):
    observed, expected = np.asarray(observed, float), np.asarray(expected, float)
    return float(((observed - expected) ** 2 / expected).sum())
