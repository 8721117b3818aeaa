import math

import pytest

from engine.errors import InvalidRequest
from engine.sampling_params import MAX_LOGPROBS, SamplingParams

BAD = [
    *[("n", v) for v in (0, -1, 129, 1.5, "1", None, True)],
    *[("temperature", v) for v in (-1, -0.1, 101, math.nan, math.inf, "hot", None, True, 10**400)],
    *[("top_p", v) for v in (0, -0.5, 1.01, math.nan, None, "1")],
    *[("top_k", v) for v in (-2, 1.5, None, "5", 2**31)],
    *[("min_p", v) for v in (-0.1, 1.1, math.nan, None)],
    *[("presence_penalty", v) for v in (-2.1, 2.1, math.nan, None)],
    *[("frequency_penalty", v) for v in (-2.1, 2.1, math.nan, None)],
    *[("repetition_penalty", v) for v in (0, -1, 101, math.nan, None)],
    *[("seed", v) for v in (2**63, -(2**63) - 1, 1.0, "1")],
    *[("max_tokens", v) for v in (0, -1, 1.5, "9")],
    *[("min_tokens", v) for v in (-1, 1.5, None)],
    *[("logprobs", v) for v in (-1, MAX_LOGPROBS + 1, True, 1.0)],
    *[("prompt_logprobs", v) for v in (-1, MAX_LOGPROBS + 1, "1")],
    *[("stop", v) for v in ("", [""], [1], None, b"x", 5, {"x": 1})],
    *[("stop_token_ids", v) for v in ([-1], [1.5], [True], ["2"], None, 7, b"\x01")],
    *[("logit_bias", v) for v in ([1], "x", {"a": 1}, {-1: 1}, {1: "x"}, {True: 1}, {1: True})],
    *[("allowed_token_ids", v) for v in ([], [-1], [1.5], [True], ["2"], 7, {1: 2})],
    *[("bad_words", v) for v in ("bad", [""], [1], None, 5, {"x": 1})],
    *[("bad_words_token_ids", v) for v in ([[-1]], [[1.5]], [1], None, ["ab"])],
    *[("logit_bias", {1: v}) for v in (100.5, -101, math.nan, math.inf)],
    *[(flag, v) for flag in ("ignore_eos", "skip_special_tokens") for v in (1, None, "yes")],
    ("include_stop_str_in_output", 0),
    ("detokenize", "no"),
]


@pytest.mark.parametrize(("field", "value"), BAD)
def test_bad_value_names_its_field(field, value):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field
    assert field in caught.value.message


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 128, "temperature": 0, "top_p": 1, "top_k": -1, "min_p": 1, "seed": -(2**63)},
        {"temperature": 100.0, "top_p": 1e-9, "top_k": 2**31 - 1, "seed": 2**63 - 1},
        {"max_tokens": None, "min_tokens": 10**6, "logprobs": 0, "prompt_logprobs": MAX_LOGPROBS},
        {"stop": "end", "stop_token_ids": [0, 5], "logit_bias": {0: -100, 7: 100.0}},
    ],
)
def test_limits_are_allowed(fields):
    SamplingParams(**fields)


@pytest.mark.parametrize("ids", [[], [5] * 17])
def test_bad_words_have_one_to_sixteen_tokens(ids):
    SamplingParams(bad_words_token_ids=[[5] * 16])
    with pytest.raises(InvalidRequest, match="1 to 16 tokens") as caught:
        SamplingParams(bad_words_token_ids=[[1], ids])
    assert caught.value.param == "bad_words"


def test_stop_strings_need_text():
    with pytest.raises(InvalidRequest, match="need detokenize") as caught:
        SamplingParams(stop="end", detokenize=False)
    assert caught.value.param == "stop"


def test_nothing_is_generated_only_to_score_the_prompt():
    assert SamplingParams(max_tokens=0, prompt_logprobs=0).max_tokens == 0
    with pytest.raises(InvalidRequest, match="or 0 with prompt_logprobs"):
        SamplingParams(max_tokens=0)


def test_one_stop_string_becomes_a_tuple():
    assert SamplingParams(stop="end").stop == ("end",)


def test_min_tokens_above_max_tokens():
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(min_tokens=5, max_tokens=4)
    assert caught.value.param == "min_tokens"


@pytest.mark.parametrize(
    ("fields", "greedy"),
    [
        ({"temperature": 0}, True),
        ({"temperature": 1e-6}, True),
        ({"top_k": 1}, True),
        ({"temperature": 0.01}, False),
        ({"top_k": 2}, False),
    ],
)
def test_greedy(fields, greedy):
    assert SamplingParams(**fields).greedy is greedy


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop", ["x"] * 33),
        ("stop", ["x" * 1025]),
        ("stop_token_ids", list(range(1025))),
        ("logit_bias", dict.fromkeys(range(1025), 1.0)),
        ("allowed_token_ids", list(range(1025))),
        ("bad_words", ["x"] * 257),
        ("bad_words", ["x" * 1025]),
        ("bad_words_token_ids", [[1]] * 513),
    ],
)
def test_lists_are_bounded(name, value):
    with pytest.raises(InvalidRequest, match="up to") as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
