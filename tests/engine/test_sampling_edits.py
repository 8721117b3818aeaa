"""Logit bias, minimum length and penalties."""

import numpy as np
import pytest
import torch

from engine.sampling.logit_bias import LogitBias
from engine.sampling.min_tokens import MinTokens
from engine.sampling.penalties import Penalties
from engine.sampling.rows import Batch, RowTable
from tests.engine.sampling_reference import edited_logits, new_row, params

torch.set_num_threads(1)
CPU = torch.device("cpu")
VOCAB = 30


def logits_of(rows):
    return torch.randn(rows, VOCAB, generator=torch.manual_seed(rows)) * 4


def test_logit_bias_of_some_rows():
    biases = {3: {0: 2.5, 29: -100.0}, 0: {i: i / 10 for i in range(11)}, 2: None, 5: {0: 100.0}}
    feature = LogitBias(6, VOCAB, CPU)
    for row, bias in biases.items():
        feature.add_row(new_row(row, params(logit_bias=bias)))
    rows = [5, 2, 0, 3]
    batch = Batch(rows, [0] * 4, CPU)
    assert feature.active(batch)
    logits = logits_of(4)
    expected = [
        edited_logits(line, params(logit_bias=biases[row]), [], 0)
        for line, row in zip(logits, rows, strict=True)
    ]
    feature.apply(logits, batch)
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-6)


def test_longer_lists_keep_the_shorter_ones():
    feature = LogitBias(2, VOCAB, CPU)
    feature.add_row(new_row(0, params(logit_bias={7: 1.0, 8: 2.0, 9: 3.0})))
    feature.add_row(new_row(1, params(logit_bias=dict.fromkeys(range(20), 1.0))))
    logits = torch.zeros(2, VOCAB)
    feature.apply(logits, Batch([0, 1], [0, 0], CPU))
    assert logits[0].nonzero().flatten().tolist() == [7, 8, 9]
    assert logits[0, 7:10].tolist() == [1, 2, 3]
    assert logits[1].tolist() == [1.0] * 20 + [0.0] * 10


def test_min_tokens_until_the_output_is_long_enough():
    feature = MinTokens(4, VOCAB, CPU, [2, 3])
    options = [
        params(min_tokens=3, stop_token_ids=[9]),
        params(min_tokens=3, ignore_eos=True, stop_token_ids=[9, 10**6]),
        params(min_tokens=3, ignore_eos=True),
        params(stop_token_ids=[9]),
    ]
    for row, option in enumerate(options):
        feature.add_row(new_row(row, option, [5] * 10))
    masked = [[2, 3, 9], [9], [], []]
    for position in (10, 11, 12, 13, 14):
        batch = Batch([0, 1, 2, 3], [position] * 4, CPU)
        assert feature.active(batch) == (position < 13)
        logits = torch.zeros(4, VOCAB)
        if feature.active(batch):
            feature.apply(logits, batch)
        got = [line.isinf().nonzero().flatten().tolist() for line in logits]
        assert got == (masked if position < 13 else [[], [], [], []])


def test_min_tokens_counts_the_output_of_a_resumed_request():
    feature = MinTokens(1, VOCAB, CPU, [2])
    feature.add_row(new_row(0, params(min_tokens=3), [5] * 12, num_prompt_tokens=10))
    assert feature.active(Batch([0], [12], CPU))
    assert not feature.active(Batch([0], [13], CPU))


PENALTIES = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"presence_penalty": 0.7},
    {"frequency_penalty": -0.4},
    {"repetition_penalty": 1.1, "presence_penalty": -1.0, "frequency_penalty": 1.5},
    {},
]


def penalties(num_rows):
    return Penalties(RowTable(num_rows, 3, CPU), num_rows, VOCAB, CPU)


@pytest.mark.parametrize("users", [PENALTIES, PENALTIES[2:4], PENALTIES[:2]], ids=len)
def test_penalties_equal_the_reference(users):
    random = np.random.default_rng(0)
    feature = penalties(len(users))
    rows = list(range(len(users)))[::-1]
    tokens = {row: random.integers(0, VOCAB, 25).tolist() for row in rows}
    options = {row: params(**users[row]) for row in rows}
    for row in rows:
        feature.add_row(new_row(row, options[row], tokens[row], num_prompt_tokens=10 + row))
    for step in range(4):  # what is sampled counts for the next step
        batch = Batch(rows, [25 + step] * len(rows), CPU)
        logits = logits_of(len(rows))
        expected = [
            edited_logits(line, options[row], tokens[row], 10 + row)
            for line, row in zip(logits, rows, strict=True)
        ]
        feature.apply(logits, batch)
        np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-5, atol=1e-5)
        sampled = random.integers(0, VOCAB, len(rows))
        feature.update(torch.from_numpy(sampled), batch)
        for row, token in zip(rows, sampled.tolist(), strict=True):
            tokens[row].append(token)


def test_seen_tokens_are_allocated_for_penalised_rows_only():
    feature = penalties(64)
    feature.add_row(new_row(40, params(), [1, 2]))
    assert feature._seen.shape[0] == 0
    feature.add_row(new_row(3, params(presence_penalty=1.0), [1, 2]))
    assert feature._seen.shape[0] == 4
    feature.add_row(new_row(4, params(presence_penalty=1.0), [1, 2]))
    assert feature._seen.shape[0] == 8
