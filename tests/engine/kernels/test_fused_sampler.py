"""The sampler as on CUDA: every feature together, through the kernels."""

import numpy as np
import pytest
import torch

from engine.sampling import Sampler
from tests.engine.kernels.fused import BATCHES, EOS, fused_sample
from tests.engine.sampling_reference import new_row, params, sample

pytest.importorskip("triton")
torch.set_num_threads(1)
CPU = torch.device("cpu")
VOCAB = 130
ROWS = 8


@pytest.mark.parametrize("kind", BATCHES)
def test_samples_as_on_the_cpu(kind, device):
    random = np.random.default_rng(3)
    fields = BATCHES[kind]
    rows = random.permutation(ROWS).tolist()
    samplers = Sampler(ROWS, VOCAB, CPU, EOS), Sampler(ROWS, VOCAB, device, EOS)
    for request in range(2):  # rows change hands
        for row in rows[request * 3 :]:
            option = params(**{**fields[(row + request) % len(fields)], "seed": row})
            for sampler in samplers:
                sampler.add_row(new_row(row, option, [1, 2, 3, row], 3))
        for step in range(2):
            logits = torch.from_numpy(random.normal(0, 3, (ROWS, VOCAB + 6))).bfloat16()[:, :VOCAB]
            positions = [4 + step] * ROWS
            expected = sample(samplers[0], logits.clone(), rows, positions)
            got = fused_sample(samplers[1], logits.to(device, copy=True), rows, positions)
            assert got.token_ids.tolist() == expected.token_ids.tolist()
            check_logprobs(got.host_logprobs(), expected.host_logprobs())


def check_logprobs(got, expected):
    assert set(got) == set(expected)
    for row, entry in expected.items():
        assert got[row].token_ids[0] == entry.token_ids[0]
        assert got[row].rank == entry.rank
        np.testing.assert_allclose(got[row].logprobs, entry.logprobs, rtol=1e-5, atol=1e-5)


def test_logits_are_left_as_they_are_where_nothing_edits_them(device):
    sampler = Sampler(3, VOCAB, device)
    for row, fields in enumerate(BATCHES["logprobs"]):
        sampler.add_row(new_row(row, params(**fields, top_p=0.9)))
    logits = torch.randn(3, VOCAB, device=device)
    before = logits.clone()
    fused_sample(sampler, logits, [0, 1, 2], [0, 0, 0])
    assert torch.equal(logits, before)


def test_tokens_may_lie_apart(device):
    logits = torch.randn(3, 2 * VOCAB, generator=torch.manual_seed(0)).to(device)[:, ::2]
    sampler = Sampler(3, VOCAB, device)
    for row in range(3):
        sampler.add_row(new_row(row, params(temperature=0.0)))
    output = fused_sample(sampler, logits, [0, 1, 2], [0, 0, 0])
    assert output.token_ids.tolist() == logits.argmax(-1).tolist()
