"""The kernel that masks tokens, and the others on logits that are mostly masked."""

import pytest
import torch

from engine.sampling import Sampler
from engine.sampling.rows import Batch
from engine.sampling.token_masks import TokenMasks
from tests.engine.kernels.fused import BATCHES, EOS
from tests.engine.sampling_reference import new_row, params

pytest.importorskip("triton")
CPU = torch.device("cpu")


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 5000])
def test_masks_as_on_the_cpu(vocab_size, device):
    from engine.kernels.token_masks import apply_token_masks

    generator = torch.manual_seed(vocab_size)
    logits = torch.randn(6, vocab_size, generator=generator)
    masks = TokenMasks.allocate([3, 0, 5], vocab_size)
    shape = masks.bits.shape
    masks.bits.copy_(torch.randint(-(2**31), 2**31, shape, generator=generator))
    masked = logits.to(device)
    apply_token_masks(masked, masks.packed.to(device), 3)
    masks.apply(logits)
    assert torch.equal(masked.cpu(), logits)


@pytest.mark.parametrize("kind", BATCHES)
def test_draws_from_few_tokens_as_on_the_cpu(kind, device):
    vocab_size, rows = 130, list(range(6))
    logits = torch.randn(6, vocab_size, generator=torch.manual_seed(0))
    masks = TokenMasks.allocate([0, 1, 2, 4], vocab_size)
    masks.bits.zero_()
    masks.bits[0, 1] = 1  # one token; the others have three
    masks.bits[1:, 2] = 0b111
    drawn = []
    for place, fused in ((CPU, False), (device, True)):
        sampler = Sampler(6, vocab_size, place, EOS)
        for row in rows:
            option = params(**{**BATCHES[kind][row % len(BATCHES[kind])], "seed": row})
            sampler.add_row(new_row(row, option, [1, 2, 3, row], 3))
        batch = Batch(rows, [4] * 6, place)
        batch.fused = fused
        output = sampler.sample(logits.to(place), batch, masks)
        drawn.append((output.token_ids.tolist(), output.host_logprobs().keys()))
    assert drawn[0] == drawn[1]
    tokens = drawn[0][0]
    assert tokens[0] == 32
    assert {tokens[1], tokens[2], tokens[4]} <= {64, 65, 66}
