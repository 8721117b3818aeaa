import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampling import Sampler, truncation
from tests.engine.sampling_reference import (
    chi_square,
    chi_square_limit,
    draw,
    kept_tokens,
    new_row,
    params,
    sample,
)

torch.set_num_threads(1)
CASES = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 250},
    {"top_p": 0.5},
    {"top_p": 0.97},
    {"top_p": 1e-9},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 299, "top_p": 0.999},
    {"min_p": 0.1, "top_p": 0.9},
    {"min_p": 0.01, "top_k": 12, "top_p": 0.6},
    {"min_p": 1.0},
    {},
]


def kept(logits, options):
    """Tokens that are kept, bool [rows, vocab]."""
    rows, vocab_size = logits.shape
    top_k = torch.tensor([[p.top_k or vocab_size] for p in options]).expand(rows, 1)
    top_p = torch.tensor([[p.top_p] for p in options]).expand(rows, 1)
    min_p = torch.tensor([[p.min_p] for p in options]).expand(rows, 1)
    floor = logits.amax(-1, keepdim=True) + min_p.log()
    return (logits >= truncation.by_candidates(logits, top_k, top_p, floor)).numpy()


@pytest.fixture(params=[(256, 4096), (4, 32), (1,)], ids=str)
def candidate_counts(request, monkeypatch):
    monkeypatch.setattr(truncation, "_CANDIDATES", request.param)


@pytest.mark.parametrize("step", [0, 0.5], ids=["distinct", "ties"])
@pytest.mark.parametrize("spread", [0.3, 2.0, 8.0])
def test_thresholds_equal_the_reference(step, spread, candidate_counts):
    options = [params(**case) for case in CASES]
    logits = torch.randn(len(CASES), 300, generator=torch.manual_seed(1)) * spread
    if step:
        logits = (logits / step).round() * step
    got = kept(logits, options)
    for row, option in enumerate(options):
        assert (got[row] == kept_tokens(logits[row].double().numpy(), option)).all(), option


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    vocab_size=st.integers(2, 40),
    top_k=st.integers(0, 45),
    top_p=st.floats(0.01, 0.999) | st.just(1.0),  # in float32 those between may be 1.0
    min_p=st.sampled_from([0.0, 0.03, 0.4]),
)
def test_random_rows_keep_what_the_reference_keeps(seed, vocab_size, top_k, top_p, min_p):
    logits = torch.randn(3, vocab_size, generator=torch.manual_seed(seed)) * 3
    logits[0, : vocab_size // 2] = -torch.inf
    option = params(top_k=min(top_k, vocab_size), top_p=top_p, min_p=min_p)
    got = kept(logits, [option])
    for row in range(3):
        assert (got[row] == kept_tokens(logits[row].double().numpy(), option)).all()


def test_ties_with_the_last_kept_token_are_kept():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0, 2.0]])
    assert kept(logits, [params(top_k=2)]).nonzero()[1].tolist() == [1, 2, 3, 5]


def test_top_k_of_one_is_greedy_even_among_ties():
    logits = torch.tensor([[0.0, 4.0, 4.0, 4.0]]).repeat(50, 1)
    assert set(draw(logits, [params(top_k=1, seed=seed) for seed in range(50)])) == {1}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 4},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(fields):
    vocab_size, draws = 12, 20_000
    logits = torch.randn(vocab_size, generator=torch.manual_seed(3)) * 1.5
    option = params(seed=99, **fields)
    x = logits.double().numpy() / option.temperature
    p = np.where(kept_tokens(x, option), np.exp(x), 0)
    p /= p.sum()
    sampler = truncated_sampler(vocab_size, option)
    counts = np.zeros(vocab_size)
    for start in range(0, draws, 100):
        positions = list(range(start, start + 100))
        tokens = sample(sampler, logits.repeat(100, 1), [*range(100)], positions).token_ids
        counts += np.bincount(tokens.numpy(), minlength=vocab_size)
    assert (counts[p == 0] == 0).all()
    live = p > 0
    assert chi_square(counts[live], draws * p[live]) < chi_square_limit(live.sum() - 1)


def truncated_sampler(vocab_size, option):
    sampler = Sampler(100, vocab_size, torch.device("cpu"))
    for row in range(100):
        sampler.add_row(new_row(row, option))
    return sampler
