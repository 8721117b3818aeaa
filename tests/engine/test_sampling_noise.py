import numpy as np
import pytest
import torch

from engine.sampling.gumbel import gumbel_argmax, random_words, stream_keys, token_words
from tests.engine.sampling_reference import chi_square, chi_square_limit, noise_bits

CPU = torch.device("cpu")
torch.set_num_threads(1)


def bits(seeds, positions, vocab_size):
    keys = stream_keys(torch.tensor(seeds), torch.tensor(positions))
    return random_words(token_words(vocab_size, CPU), keys).numpy()


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
def test_noise_is_the_documented_function(seed):
    positions = [0, 1, 1000, 2**20]
    got = bits([seed] * len(positions), positions, 40)
    expected = [
        [noise_bits(seed, position, token) for token in range(40)] for position in positions
    ]
    assert got.tolist() == expected


def test_noise_does_not_depend_on_the_batch():
    seeds, positions = list(range(32)), list(range(100, 132))
    batch = bits(seeds, positions, 1000)
    for row in (0, 7, 31):
        assert (bits([seeds[row]], [positions[row]], 1000)[0] == batch[row]).all()


def assert_uniform(values, bins=256):
    """Highest and lowest bits of 31-bit values."""
    values = np.asarray(values).ravel()
    expected = np.full(bins, values.size / bins)
    for part in (values >> 23, values & 255):
        counts = np.bincount(part, minlength=bins)
        assert chi_square(counts, expected) < chi_square_limit(bins - 1)


def test_uniform_over_tokens():
    for seed, position in ((0, 0), (1, 0), (0, 1), (12345, 678)):
        assert_uniform(bits([seed], [position], 100_000))


def test_uniform_over_positions():
    assert_uniform(bits([7] * 20_000, list(range(20_000)), 5))


def test_uniform_over_adjacent_seeds():
    assert_uniform(bits(list(range(20_000)), [3] * 20_000, 5))
    assert_uniform(bits([seed << 32 for seed in range(20_000)], [3] * 20_000, 5))


@pytest.mark.parametrize(
    "pair",
    [
        (([5], [9]), ([6], [9])),
        (([5], [9]), ([5], [10])),
        (([5], [9]), ([-5], [9])),
        (([5], [9]), ([6], [8])),
        (([5], [9]), ([5 | (1 << 40)], [9])),
    ],
)
def test_neighbouring_streams_are_independent(pair):
    first, second = (bits(*stream, 200_000)[0] for stream in pair)
    joint = (first >> 27) * 16 + (second >> 27)
    assert chi_square(np.bincount(joint, minlength=256), np.full(256, 200_000 / 256)) < (
        chi_square_limit(255)
    )
    assert_uniform(first ^ second)
    # A shift between the streams would show as equal words.
    assert len(np.intersect1d(first, second)) < 200_000**2 / 2**31 * 2


def test_neighbouring_tokens_are_independent():
    values = bits([3], [4], 200_001)[0]
    for lag in (1, 2, 256):
        joint = (values[:-lag] >> 27) * 16 + (values[lag:] >> 27)
        counts = np.bincount(joint, minlength=256)
        assert chi_square(counts, np.full(256, len(joint) / 256)) < chi_square_limit(255)


def test_successive_draws_are_independent():
    size, draws = 8, 40_000
    keys = stream_keys(torch.full((draws,), 11), torch.arange(draws))
    tokens = gumbel_argmax(torch.zeros(draws, size), token_words(size, CPU), keys).numpy()
    joint = np.bincount(tokens[:-1] * size + tokens[1:], minlength=size * size)
    expected = np.full(size * size, (draws - 1) / size**2)
    assert chi_square(joint, expected) < chi_square_limit(size**2 - 1)


def test_noise_is_finite_at_the_extremes(monkeypatch):
    for word in (0, 2**31 - 1):
        monkeypatch.setattr(
            "engine.sampling.gumbel.random_words",
            lambda words, keys, word=word: torch.full((1, len(words)), word, dtype=torch.int32),
        )
        logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
        keys = torch.zeros((1, 2), dtype=torch.int32)
        assert gumbel_argmax(logits, token_words(3, CPU), keys).item() == 1
