import numpy as np
import pytest
import torch

from engine.sampling.gumbel import random_words, stream_keys, token_words
from tests.engine.kernels.sampling_reference import CPU, drawn

pytest.importorskip("triton")

import triton
import triton.language as tl

from engine.kernels import draw as kernels

torch.set_num_threads(1)


def tables(num_rows):
    """Temperatures, every third of them 0, and seeds, side by side with other numbers."""
    generator = torch.manual_seed(num_rows)
    temperature = torch.rand(num_rows, 6, generator=generator)[:, 2:3] * 2 + 0.01
    temperature[::3] = 0
    seeds = torch.randint(-(2**63), 2**63 - 1, (num_rows, 3), generator=generator)[:, 1:2]
    seeds[:4, 0] = torch.tensor([0, -(2**63), 2**63 - 1, -1])
    return temperature, seeds


@pytest.fixture(params=["a line each", "lines share", "one program a line", "one for all lines"])
def division(request, monkeypatch):
    """How lines and tiles are given to programs."""
    if "share" in request.param or "all" in request.param:
        monkeypatch.setattr(kernels, "LARGE_BATCH", 1)
    if "one" in request.param:
        monkeypatch.setattr(kernels, "_PROGRAMS", 1)


def draw(device, *tensors):
    return kernels.draw(*(tensor.to(device) for tensor in tensors)).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [2, 1024])
def test_draws_the_same_tokens_as_torch(vocab_size, dtype, device):
    check_draws(vocab_size, dtype, device)


@pytest.mark.usefixtures("division")
def test_draws_the_same_tokens_however_the_work_is_divided(device):
    check_draws(1301, torch.bfloat16, device)


def check_draws(vocab_size, dtype, device):
    random = np.random.default_rng(vocab_size)
    temperature, seeds = tables(10)
    rows = torch.from_numpy(random.permutation(10))
    positions = torch.from_numpy(random.integers(0, 2**40, 10))
    logits = torch.from_numpy(random.normal(0, 4, (10, vocab_size + 9)))
    logits = logits.to(dtype)[:, :vocab_size]  # lines apart
    logits[4, : vocab_size // 2] = -torch.inf
    logits[5] = 1.0
    arguments = (logits, rows, positions, temperature, seeds)
    assert draw(device, *arguments) == drawn(*arguments)
    threshold = torch.where(temperature == 0, torch.inf, logits[rows.argsort(), 0:1] / temperature)
    threshold = threshold.float()[rows, 0]
    assert draw(device, *arguments, threshold) == drawn(*arguments, threshold)


@pytest.mark.usefixtures("division")
def test_the_first_of_several_largest_wins(device):
    logits = torch.full((4, 1500), -2.0)
    logits[0] = 5.0
    logits[1, [1025, 300, 1499]] = 1.0
    logits[2, [1023, 1024]] = torch.inf
    logits[3, 100:], logits[3, 1200] = -0.0, 0.0
    zeros = torch.zeros(4, dtype=torch.int64)
    tokens = draw(device, logits, torch.arange(4), zeros, torch.zeros(4, 1), zeros[:, None])
    assert tokens == [0, 300, 1023, 100]


@pytest.mark.usefixtures("division")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_is_never_drawn(temperature, device):
    logits = torch.full((3, 1200), torch.nan)
    logits[1, 1111] = -3.0
    logits[2] = -torch.inf
    zeros = torch.zeros(3, dtype=torch.int64)
    temperatures = torch.full((3, 1), temperature)
    tokens = draw(device, logits, torch.arange(3), zeros, temperatures, zeros[:, None])
    assert tokens == [0, 1111, 0]


@pytest.mark.parametrize(("temperature", "offset"), [(0.02, 0.0), (1.0, -300.0), (1.7, 40.0)])
def test_scores_decide_where_upper_bounds_do_not(temperature, offset, device):
    vocab_size, random = 64, np.random.default_rng(5)
    temperatures, seeds = torch.full((2, 1), temperature), torch.arange(2)[:, None]
    zeros = torch.zeros(2, dtype=torch.int64)
    bits = random_words(token_words(vocab_size, CPU), stream_keys(seeds[:, 0], zeros))
    noise = -np.log(-np.log1p(-uniform(bits)))
    levels = np.stack([random.permutation(vocab_size) for _ in range(2)]) * 1e-3
    logits = torch.from_numpy((levels + offset - noise) * temperature).float()
    tokens = draw(device, logits, torch.arange(2), zeros, temperatures, seeds)
    assert tokens == levels.argmax(axis=1).tolist()


@triton.jit
def gumbel_kernel(bits, noise, bound, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(bits + place)
    tl.store(noise + place, kernels._gumbel(words))
    tl.store(bound + place, kernels._noise_bound(words, -kernels._LOG2, kernels._BOUND_BASE))


def noise_and_bound(words, device):
    """Of int32 words, a multiple of 4096."""
    noise, bound = torch.empty((2, len(words)), device=device)
    grid = (len(words) // 4096,)
    gumbel_kernel[grid](words.to(device), noise, bound, BLOCK=4096, enable_fp_fusion=False)
    return noise.cpu().numpy(), bound.cpu().numpy()


def uniform(words):
    """The u of 31 random bits, float64 in numpy, as float32 rounds it."""
    u = words.float().numpy() * np.float32((1 - 2.0**-24) * 2.0**-31) + np.float32(2.0**-32)
    return u.astype(np.float64)


def test_the_bound_is_never_below_the_noise_nor_far_above(device):
    powers = 2 ** np.arange(31)[:, None]
    edges = (powers + np.arange(-600, 600)).clip(0, 2**31 - 1).ravel()
    steps = (powers * np.linspace(1, 2, 2000)).clip(0, 2**31 - 1).ravel()
    anywhere = np.random.default_rng(0).integers(0, 2**31, 2**18)
    words = torch.from_numpy(np.concatenate([edges, steps, anywhere]).astype(np.int64)).int()
    words = words[: len(words) // 4096 * 4096]
    noise, bound = noise_and_bound(words, device)
    excess, u = bound - noise, uniform(words)
    assert excess.min() > -1e-4
    likely = (u < 0.5) & (words.numpy() > 100)
    assert (excess - u)[likely].max() < 0.07


def test_noise_is_precise_and_finite_at_the_extremes(device):
    bits = np.concatenate(
        [
            [0, 1, 2, 2**29 - 1, 2**29],
            np.geomspace(3, 2**31 - 1, 2043),
            2**31 - np.geomspace(1, 2**31, 2048),
        ]
    )
    words = torch.from_numpy(bits.astype(np.int64)).int()
    noise, _ = noise_and_bound(words, device)
    expected = -np.log(-np.log1p(-uniform(words)))
    np.testing.assert_allclose(noise, expected, rtol=2e-7, atol=3e-7)
