"""The sampler as a whole: every feature together, rows, resumption, and what it must not do."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from engine.sampling import Sampler
from tests.engine.sampling_reference import new_row, params, sample, scores

torch.set_num_threads(1)
CPU = torch.device("cpu")
VOCAB = 64
EOS = (2, 3)

OPTIONS = st.fixed_dictionaries(
    {"seed": st.integers(-(2**63), 2**63 - 1)},
    optional={
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        "top_k": st.integers(0, VOCAB + 3),
        "top_p": st.floats(0.05, 1.0),
        "min_p": st.floats(0.0, 0.5),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.5, 2),
        "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), max_size=9),
        "min_tokens": st.integers(0, 6),
        "stop_token_ids": st.lists(st.integers(0, VOCAB - 1), max_size=3),
        "ignore_eos": st.booleans(),
        "bad_words_token_ids": st.lists(
            st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3), max_size=2
        ),
        # Enough that end tokens and bad words leave one.
        "allowed_token_ids": st.lists(st.integers(0, VOCAB - 1), min_size=8, unique=True),
    },
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(options=st.lists(OPTIONS, min_size=1, max_size=6), seed=st.integers(0, 2**31))
def test_any_mixture_draws_what_the_reference_draws(options, seed):
    random = np.random.default_rng(seed)
    options = [params(**each) for each in options]
    rows = random.permutation(10)[: len(options)].tolist()
    sampler = Sampler(10, VOCAB, CPU, EOS)
    tokens, prompts = [], []
    for row, option in zip(rows, options, strict=True):
        tokens.append(random.integers(0, VOCAB, random.integers(1, 12)).tolist())
        prompts.append(int(random.integers(1, len(tokens[-1]) + 1)))
        sampler.add_row(new_row(row, option, tokens[-1], prompts[-1]))
    for _ in range(3):
        logits = torch.from_numpy(random.normal(0, 3, (len(rows), VOCAB))).float()
        sampled = sample(sampler, logits.clone(), rows, [len(t) for t in tokens]).token_ids
        for place, token in enumerate(sampled.tolist()):
            line = logits[place].numpy()
            expected = scores(line, options[place], tokens[place], prompts[place], EOS)
            assert expected[token] > expected.max() - 1e-4
            tokens[place].append(token)


def model(token_ids):
    """Logits [vocab] that depend on the last two tokens."""
    seed = (token_ids[-1] * 1000 + token_ids[-2]) % 2**31
    return torch.randn(VOCAB, generator=torch.manual_seed(seed)) * 2


def generate(sampler, row, option, token_ids, num_prompt, until):
    sampler.add_row(new_row(row, option, token_ids, num_prompt))
    token_ids = list(token_ids)
    while len(token_ids) < until:
        output = sample(sampler, model(token_ids)[None].clone(), [row], [len(token_ids)])
        token_ids += output.token_ids.tolist()
    return token_ids


MIXED = {
    "temperature": 0.9,
    "top_p": 0.95,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.6,
    "bad_words_token_ids": [[token, token + step] for token in range(60) for step in range(4)],
    "allowed_token_ids": [*range(60)],
    "min_tokens": 20,
    "seed": 77,
}


@pytest.mark.parametrize("cut", [4, 5, 17, 39])
@pytest.mark.parametrize("fields", [MIXED, {**MIXED, "temperature": 0.0}], ids=["drawn", "greedy"])
def test_resumption_goes_on_as_if_undisturbed(cut, fields):
    prompt = [5, 6, 7, 5]
    whole = generate(Sampler(4, VOCAB, CPU, EOS), 0, params(**fields), prompt, 4, 40)
    resumed = generate(Sampler(4, VOCAB, CPU, EOS), 3, params(**fields), whole[:cut], 4, 40)
    assert resumed == whole
    unpenalised = params(**{**fields, "repetition_penalty": 1.0, "frequency_penalty": 0.0})
    assert generate(Sampler(4, VOCAB, CPU, EOS), 0, unpenalised, prompt, 4, 40) != whole


def test_same_seed_same_token_alone_in_a_batch_and_in_another_row():
    option = params(**MIXED)
    line = model([1, 2])
    tokens = []
    for rows, place in (([0], 0), (list(range(32)), 9), (list(range(32))[::-1], 30), ([17, 3], 1)):
        for chunk in range(3):
            sampler = Sampler(32, VOCAB, CPU, EOS)
            logits = torch.randn(len(rows), VOCAB, generator=torch.manual_seed(chunk))
            logits[place] = line
            for row in rows:
                other = params(seed=row, temperature=0.5 * (row % 3), top_k=row % 4)
                sampler.add_row(new_row(row, other, [1, 2], 1))
            sampler.add_row(new_row(rows[place], option, [1, 2, 9, 9], 2))
            sampled = sample(sampler, logits, rows, [4] * len(rows)).token_ids
            tokens.append(int(sampled[place]))
    assert len(set(tokens)) == 1
    seeds = {
        generate(Sampler(1, VOCAB, CPU), 0, params(seed=s), [1, 2], 2, 3)[-1] for s in range(9)
    }
    assert len(seeds) > 3


def test_a_row_keeps_nothing_of_its_last_request():
    everything = params(
        logit_bias={1: 100.0, 2: 100.0}, stop_token_ids=[0, 4], logprobs=4, **{**MIXED, "top_k": 2}
    )
    for fields in ({"temperature": 0.0}, {"seed": 5}, {"seed": 5, "presence_penalty": 0.5}):
        used, fresh = Sampler(2, VOCAB, CPU, EOS), Sampler(2, VOCAB, CPU, EOS)
        generate(used, 1, everything, [1, 2, 3, 3, 4], 2, 12)
        expected = generate(fresh, 1, params(**fields), [8, 9], 2, 40)
        assert generate(used, 1, params(**fields), [8, 9], 2, 40) == expected
        assert sample(used, torch.zeros(1, VOCAB), [1], [3]).logprobs is None


def test_logits_may_be_bfloat16_and_strided():
    logits = torch.randn(3, 2 * VOCAB, generator=torch.manual_seed(0)).bfloat16()[:, ::2]
    sampler = Sampler(3, VOCAB, CPU)
    for row in range(3):
        sampler.add_row(new_row(row, params(temperature=0.0, logit_bias={row: 50.0})))
    assert sample(sampler, logits, [0, 1, 2], [0, 0, 0]).token_ids.tolist() == [0, 1, 2]


class Recorder(TorchDispatchMode):
    """Notes the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_greedy_batch_is_one_argmax():
    sampler = Sampler(4, VOCAB, CPU, EOS)
    for row in range(3):
        sampler.add_row(new_row(row, params(temperature=0.0, min_tokens=2), [1, 2]))
    sampler.add_row(new_row(3, params(**MIXED), [1, 2]))
    logits = torch.zeros(3, VOCAB)
    with Recorder() as recorder:
        sample(sampler, logits, [0, 1, 2], [9, 9, 9])
    assert recorder.names == ["argmax"]


@pytest.mark.parametrize(
    ("fields", "forbidden"),
    [
        ({}, {"topk", "sort", "exp_", "bincount", "scatter_add_", "where", "index_add_", "gt"}),
        ({"temperature": 0.0, "logprobs": 0}, {"topk", "log1p_", "bitwise_xor"}),
        ({"presence_penalty": 1.0, "temperature": 0.0}, {"where", "scatter_add_", "log1p_"}),
        ({"top_k": 5}, {"scatter_add_", "index_add_", "sort"}),
    ],
    ids=["sampled", "logprobs", "penalty", "top_k"],
)
def test_unused_features_do_not_run(fields, forbidden):
    sampler = Sampler(4, VOCAB, CPU, EOS)
    for row in range(2):
        sampler.add_row(new_row(row, params(**fields), [1, 2]))
    with Recorder() as recorder:
        sample(sampler, torch.randn(2, VOCAB), [0, 1], [2, 2])
    assert not forbidden & set(recorder.names)
