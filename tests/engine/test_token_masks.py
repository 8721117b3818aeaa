"""Masks on logits: only what is allowed stays, and rows without a mask are left alone."""

import pytest
import torch

from engine.sampling import Sampler
from engine.sampling.rows import Batch
from engine.sampling.token_masks import TokenMasks
from tests.engine.gpu import DEVICES
from tests.engine.sampling_reference import new_row, params

VOCAB = 299  # no multiple of 32


def masks_of(places, allowed, device="cpu"):
    masks = TokenMasks.allocate(places, VOCAB, pin_memory=device == "cuda")
    masks.bits.zero_()
    for bits, tokens in zip(masks.bits, allowed, strict=True):
        for token in tokens:
            bits[token // 32] |= torch.tensor(1 << (token % 32)).to(torch.int32)
    return masks


@pytest.mark.parametrize("device", DEVICES)
def test_only_allowed_tokens_stay(device):
    logits = torch.randn(5, VOCAB, generator=torch.manual_seed(0))
    allowed = [[0, 31, 32, 298], [7], list(range(VOCAB))]
    expected = logits.clone()
    for place, tokens in zip([4, 0, 2], allowed, strict=True):
        keep = torch.zeros(VOCAB, dtype=torch.bool)
        keep[tokens] = True
        expected[place, ~keep] = -torch.inf
    masked = logits.to(device)
    masks_of([4, 0, 2], allowed, device).apply(masked)
    assert torch.equal(masked.cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 40},
        {"temperature": 1.0, "top_p": 0.5, "min_p": 0.1},
        {"temperature": 1.0, "repetition_penalty": 1.5, "logit_bias": {3: 50.0}},
        {"temperature": 0.0, "logprobs": 3},
    ],
)
def test_sampler_draws_what_is_allowed_and_others_are_unchanged(options, device):
    allowed = [[5, 6, 7], [3], [100, 200, 298]]
    places, rows = [1, 3, 6], list(range(8))
    logits = torch.randn(8, VOCAB, generator=torch.manual_seed(1)).to(device)
    drawn = []
    for masks in (None, masks_of(places, allowed, device)):
        sampler = Sampler(8, VOCAB, torch.device(device), [2])
        for row in rows:
            sampler.add_row(new_row(row, params(**options, seed=row), [1, 2, 3], 3))
        batch = Batch(rows, [3] * 8, torch.device(device))
        output = sampler.sample(logits.clone(), batch, masks)
        drawn.append((output.token_ids.tolist(), output.host_logprobs()))
    (free, free_logprobs), (masked, masked_logprobs) = drawn
    for place, tokens in zip(places, allowed, strict=True):
        assert masked[place] in tokens
    others = [place for place in rows if place not in places]
    assert [masked[place] for place in others] == [free[place] for place in others]
    for row, entry in masked_logprobs.items():  # of the model itself, before the masks
        of_token = torch.log_softmax(logits[row].float().cpu(), -1)[masked[row]]
        assert entry.logprobs[0] == pytest.approx(of_token.item(), abs=1e-4)
        assert entry.token_ids[1:] == free_logprobs[row].token_ids[1:]
