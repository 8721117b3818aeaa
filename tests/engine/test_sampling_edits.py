"""Logit bias, minimum length, penalties, allowed tokens and bad words."""

import numpy as np
import pytest
import torch

from engine.sampling import Sampler
from engine.sampling.allowed_tokens import AllowedTokens
from engine.sampling.bad_words import BadWords
from engine.sampling.logit_bias import LogitBias
from engine.sampling.min_tokens import MinTokens
from engine.sampling.penalties import Penalties
from engine.sampling.rows import RELUCTANCE, Batch, RowTable
from engine.sampling.token_masks import TokenMasks
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


def ruled_out(before, after):
    """By line: token id → how often `RELUCTANCE` was taken off its logit."""
    return [
        {token: round(change / RELUCTANCE) for token, change in enumerate(line) if change}
        for line in (before - after).tolist()
    ]


def test_other_tokens_than_those_allowed_are_ruled_out():
    feature = AllowedTokens(6, VOCAB, CPU)
    allowed = {3: [0, 29], 0: [*range(11)], 2: None, 5: [7, 7]}
    for row, ids in allowed.items():
        feature.add_row(new_row(row, params(allowed_token_ids=ids)))
    assert not feature.active(Batch([2], [0], CPU))
    rows = [5, 2, 0, 3]
    logits = logits_of(4)
    logits[0, 7] = -torch.inf  # stays what another feature made of it
    before = logits.clone()
    feature.apply(logits, Batch(rows, [0] * 4, CPU))
    for row, line in zip(rows, ruled_out(before.nan_to_num(), logits.nan_to_num()), strict=True):
        kept = range(VOCAB) if allowed[row] is None else allowed[row]
        assert line == dict.fromkeys(set(range(VOCAB)) - set(kept), 2)
    assert logits[3, [0, 29]].tolist() == before[3, [0, 29]].tolist()
    feature.add_row(new_row(3, params()))
    assert not feature.active(Batch([3], [0], CPU))


def test_only_the_end_of_a_bad_word_is_ruled_out_and_only_there():
    feature = BadWords(8, VOCAB, CPU)
    words = [[4], [5, 6, 7], [6, 7], [8, 9], [9, 7]]
    feature.add_row(new_row(6, params(bad_words_token_ids=words), [1, 5], num_prompt_tokens=2))
    feature.add_row(new_row(1, params(bad_words_token_ids=[[2, 2]]), [2, 2], num_prompt_tokens=1))
    feature.add_row(new_row(2, params()))
    batch = Batch([1, 2, 6], [0] * 3, CPU)
    expected = [
        [{2: 1}, {}, {4: 1}],  # what the prompt ends with does not count
        [{}, {}, {4: 1}],
        [{2: 1}, {}, {4: 1, 7: 1}],  # two words end with the same token
        [{2: 1}, {}, {4: 1}],
    ]
    for sampled, now in zip(([3, 3, 5], [2, 3, 6], [2, 3, 7], [2, 3, 7]), expected, strict=True):
        logits = logits_of(3)
        before = logits.clone()
        feature.apply(logits, batch)
        assert ruled_out(before, logits) == now
        feature.update(torch.tensor(sampled), batch)


@pytest.mark.parametrize("length", [1, 2, 15, 16])
def test_bad_words_of_any_length_in_rows_that_come_and_go(length):
    """A row is widened by others, resumed in the middle of a word, and then given away."""
    word = [*range(10, 10 + length)]
    feature = BadWords(3, VOCAB, CPU)
    resumed = new_row(0, params(bad_words_token_ids=[word]), [1, *word[:-1]], num_prompt_tokens=1)
    feature.add_row(resumed)
    feature.add_row(new_row(2, params(bad_words_token_ids=[[i, 3] for i in range(9)]), [1]))
    batch = Batch([0], [length], CPU)
    logits = torch.zeros(1, VOCAB)
    feature.apply(logits, batch)
    assert ruled_out(torch.zeros(1, VOCAB), logits) == [{word[-1]: 1}]
    feature.add_row(new_row(0, params(), [1]))
    assert not feature.active(batch)


def test_what_is_ruled_out_comes_when_nothing_else_can():
    """Rather a bad word than a token that is not allowed, and rather that than a masked one."""
    sampler = Sampler(2, 6, CPU)
    options = {"temperature": 0.0, "allowed_token_ids": [3], "bad_words_token_ids": [[3]]}
    for row in (0, 1):
        sampler.add_row(new_row(row, params(**options), [1]))
    logits = torch.tensor([[9.0, 8.0, 7.0, 1.0, 6.0, 5.0]]).repeat(2, 1)
    masks = TokenMasks.allocate([1], 6)
    masks.bits.fill_(0b110100)  # 2, 4 and 5 are left, of which the first is likeliest
    output = sampler.sample(logits, Batch([0, 1], [1, 1], CPU), masks)
    assert output.token_ids.tolist() == [3, 2]
