import random
from types import SimpleNamespace

import pytest

from engine.errors import InvalidRequest
from engine.inputs import (
    check_token_options,
    fan_out,
    prompt_text,
    spell_bad_words,
    tokenize_prompt,
)
from engine.sampling_params import SamplingParams
from tests.engine.tokenizer_cases import smollm2


def ids_of(prompt, max_model_len=100, vocab_size=49152, tokenizer=None):
    return tokenize_prompt(prompt, tokenizer or smollm2(), max_model_len, vocab_size)


def test_kinds_of_prompt():
    ids = smollm2().encode("Hello world")
    for prompt in ("Hello world", {"prompt": "Hello world"}, {"prompt_token_ids": ids}):
        assert ids_of(prompt) == ids
    assert [prompt_text(p) for p in ("a", {"prompt": "b"}, {"prompt_token_ids": [1]})] == [
        "a",
        "b",
        None,
    ]


def test_token_ids_win_over_text_and_are_copied():
    given = [5, 6]
    ids = ids_of({"prompt": "Hello", "prompt_token_ids": given})
    assert ids == given
    assert ids is not given


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "must not be empty"),
        ({"prompt": ""}, "must not be empty"),
        ({"prompt_token_ids": []}, "at least one token"),
        ({}, "must be a text"),
        (7, "must be a text"),
        ({"prompt": 7}, "must be a text"),
        ({"prompt_token_ids": "12"}, "list of token ids"),
        ({"prompt_token_ids": [1, "2"]}, "integers only"),
        ({"prompt_token_ids": [1, True]}, "integers only"),
        ({"prompt_token_ids": [1.0]}, "integers only"),
        ({"prompt_token_ids": [1, 49152]}, r"49152 is outside .*0 to 49151"),
        ({"prompt_token_ids": [1, -1]}, "-1 is outside"),
        ({"prompt_token_ids": [1] * 100}, r"has 100 tokens, but max_model_len is 100.* to 99 tok"),
        ("a\ud800", "surrogate"),
    ],
)
def test_bad_prompts_are_the_caller_s_error(prompt, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        ids_of(prompt)
    assert caught.value.param == "prompt"


def test_the_longest_prompt_leaves_room_for_one_token():
    assert len(ids_of({"prompt_token_ids": [1] * 99})) == 99


def test_text_needs_a_tokenizer():
    assert tokenize_prompt({"prompt_token_ids": [1]}, None, 10, 10) == [1]
    with pytest.raises(InvalidRequest, match="prompt_token_ids"):
        tokenize_prompt("Hello", None, 10, 10)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"stop_token_ids": [5, 10]}, "stop_token_ids"),
        ({"logit_bias": {10: 1.0}}, "logit_bias"),
        ({"allowed_token_ids": [10]}, "allowed_token_ids"),
        ({"bad_words_token_ids": [[1], [2, 10]]}, "bad_words"),
    ],
)
def test_options_must_name_tokens_of_the_vocabulary(options, param):
    with pytest.raises(InvalidRequest, match="token 10") as caught:
        check_token_options(SamplingParams(**options), 10)
    assert caught.value.param == param
    check_token_options(SamplingParams(**options), 11)


def test_bad_words_are_spelled_at_the_start_of_a_text_and_within_it():
    tokenizer = smollm2()
    params = SamplingParams(bad_words=["Paris", " Paris", "foo bar", " "])
    spelled = [
        tokenizer.decode(ids) for ids in spell_bad_words(params, tokenizer).bad_words_token_ids
    ]
    assert spelled == ["Paris", " Paris", "foo bar", " foo bar", " ", "  "]
    assert spell_bad_words(SamplingParams(), None) == SamplingParams()
    spelled = spell_bad_words(params, tokenizer)
    assert spell_bad_words(spelled, None) is spelled  # for the next prompt


@pytest.mark.parametrize(
    ("words", "has_tokenizer", "message"),
    [(["x"], False, "need a tokenizer"), (["one " * 17], True, "1 to 16 tokens")],
)
def test_bad_words_that_cannot_be_spelled(words, has_tokenizer, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        spell_bad_words(SamplingParams(bad_words=words), smollm2() if has_tokenizer else None)
    assert caught.value.param == "bad_words"


def test_bad_words_are_spelled_until_one_is_too_long():
    tokenizer, spelled = smollm2(), []
    counting = SimpleNamespace(
        encode=lambda text, **options: spelled.append(text) or tokenizer.encode(text, **options)
    )
    with pytest.raises(InvalidRequest, match="16 tokens"):
        spell_bad_words(SamplingParams(bad_words=["x y " * 256] * 256), counting)
    assert len(spelled) == 1


def test_bad_words_must_leave_an_allowed_token():
    fields = {"allowed_token_ids": [3, 4], "bad_words_token_ids": [[3], [4]]}
    with pytest.raises(InvalidRequest, match="allow another") as caught:
        check_token_options(SamplingParams(**fields), 10)
    assert caught.value.param == "bad_words"
    fields["bad_words_token_ids"] = [[3], [4, 4]]
    check_token_options(SamplingParams(**fields), 10)


def test_single_completion_keeps_its_id_and_seed():
    params = SamplingParams(seed=5)
    assert fan_out(params, "r") == [("r", params)]


def test_completions_have_seeds_in_sequence():
    children = fan_out(SamplingParams(n=3, seed=2**63 - 2, temperature=0.5), "r")
    assert [request_id for request_id, _ in children] == ["r-0", "r-1", "r-2"]
    assert [params.seed for _, params in children] == [2**63 - 2, 2**63 - 1, -(2**63)]
    assert all(params.n == 1 and params.temperature == 0.5 for _, params in children)


def test_log_probabilities_of_the_prompt_are_computed_once():
    children = fan_out(SamplingParams(n=3, seed=0, prompt_logprobs=2, logprobs=1), "r")
    assert [params.prompt_logprobs for _, params in children] == [2, None, None]
    assert [params.logprobs for _, params in children] == [1, 1, 1]


def test_completions_of_nothing_are_as_many_as_were_asked_for():
    children = fan_out(SamplingParams(n=2, seed=0, prompt_logprobs=2, max_tokens=0), "r")
    assert [params.max_tokens for _, params in children] == [0, 0]


def test_missing_seeds_are_drawn():
    drawn = fan_out(SamplingParams(n=2), "r", random.Random(1))
    assert drawn == fan_out(SamplingParams(n=2), "r", random.Random(1))
    first, second = (params.seed for _, params in drawn)
    assert second == first + 1
    seeds = {fan_out(SamplingParams(), "r")[0][1].seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**63 for seed in seeds)
