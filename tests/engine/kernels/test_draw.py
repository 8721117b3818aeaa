import numpy as np
import pytest
import torch

from tests.engine.kernels.sampling_reference import drawn

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


def draw(device, *tensors):
    return kernels.draw(*(tensor.to(device) for tensor in tensors)).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [2, 100, 2048, 5001])
def test_draws_the_same_tokens_as_torch(vocab_size, dtype, device):
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


def test_the_first_of_several_largest_wins(device):
    logits = torch.full((4, 7000), -2.0)
    logits[0] = 5.0
    logits[1, [2049, 300, 6999]] = 1.0
    logits[2, [2047, 2048]] = torch.inf
    logits[3, 100:], logits[3, 6000] = -0.0, 0.0
    zeros = torch.zeros(4, dtype=torch.int64)
    tokens = draw(device, logits, torch.arange(4), zeros, torch.zeros(4, 1), zeros[:, None])
    assert tokens == [0, 300, 2047, 100]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_is_never_drawn(temperature, device):
    logits = torch.full((3, 5000), torch.nan)
    logits[1, 4321] = -3.0
    logits[2] = -torch.inf
    zeros = torch.zeros(3, dtype=torch.int64)
    temperatures = torch.full((3, 1), temperature)
    tokens = draw(device, logits, torch.arange(3), zeros, temperatures, zeros[:, None])
    assert tokens == [0, 4321, 0]


@triton.jit
def gumbel_kernel(bits, out, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(out + place, kernels._gumbel(tl.load(bits + place)))


def test_noise_is_precise_and_finite_at_the_extremes(device):
    bits = np.concatenate(
        [
            [0, 1, 2, 2**29 - 1, 2**29],
            np.geomspace(3, 2**31 - 1, 2043),
            2**31 - np.geomspace(1, 2**31, 2048),
        ]
    )
    words = torch.from_numpy(bits.astype(np.int64)).int()
    out = torch.empty(4096, device=device)
    gumbel_kernel[(1,)](words.to(device), out, BLOCK=4096, enable_fp_fusion=False)
    u = words.float().numpy() * np.float32((1 - 2.0**-24) * 2.0**-31) + np.float32(2.0**-32)
    expected = -np.log(-np.log1p(-u.astype(np.float64)))
    np.testing.assert_allclose(out.cpu().numpy(), expected, rtol=2e-7, atol=3e-7)
