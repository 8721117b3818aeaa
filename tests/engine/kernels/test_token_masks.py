"""The kernel that masks tokens, against the CPU's way."""

import pytest
import torch

from engine.kernels.token_masks import apply_token_masks
from engine.sampling.token_masks import TokenMasks


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 5000])
def test_masks_as_on_the_cpu(vocab_size):
    generator = torch.manual_seed(vocab_size)
    logits = torch.randn(6, vocab_size, generator=generator)
    masks = TokenMasks.allocate([3, 0, 5], vocab_size)
    shape = masks.bits.shape
    masks.bits.copy_(torch.randint(-(2**31), 2**31, shape, generator=generator))
    expected = logits.clone()
    masks.apply(expected)
    apply_token_masks(logits, masks.packed, 3)
    assert torch.equal(logits, expected)
