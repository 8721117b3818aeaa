import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import output_processor
from engine.output_processor import OutputProcessor
from engine.outputs import Logprob, TokenDelta, TokenLogprobs
from engine.sampling_params import SamplingParams
from tests.engine.test_detokenizer import match_by_hand, pieces_of
from tests.engine.tokenizer_cases import TEXTS, sentencepiece_like, smollm2

PROMPT = [1, 100]


def processor(tokenizer=None, index=0, **params):
    return OutputProcessor(
        tokenizer or smollm2(), SamplingParams(**{"max_tokens": None} | params), PROMPT, index
    )


def tokens(text):
    return smollm2().encode(text)


def run(subject, ids, cuts=(), finish="length"):
    """Push ids in pieces; returns the deltas of the caller."""
    pieces = pieces_of(ids, cuts)
    out = []
    for last, piece in zip([*[False] * (len(pieces) - 1), True], pieces, strict=True):
        delta = TokenDelta("r", piece, finish_reason=finish if last else None)
        out.append(subject.push(delta))
    return out


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(TEXTS), st.lists(st.integers(0, 60), max_size=20))
def test_text_and_tokens_do_not_depend_on_the_division(text, cuts):
    subject = processor()
    deltas = run(subject, tokens(text), cuts)
    assert "".join(delta.text for delta in deltas) == subject.result().text == text
    assert subject.result().token_ids == tokens(text)
    assert (subject.result().finish_reason, deltas[-1].finish_reason) == ("length", "length")
    assert not subject.must_abort


@settings(max_examples=150, deadline=None)
@given(
    text=st.text("ab \n😀é", max_size=30),
    stop=st.lists(st.text("ab \n😀é", min_size=1, max_size=3), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 60), max_size=20),
    include=st.booleans(),
)
def test_stop_decisions_do_not_depend_on_the_division(text, stop, cuts, include):
    subject = processor(stop=stop, include_stop_str_in_output=include)
    ids = tokens(text)
    deltas = run(subject, ids, cuts)
    expected, matched = match_by_hand(stop, text, include)
    result = subject.result()
    assert "".join(delta.text for delta in deltas) == result.text == expected
    assert result.stop_reason == matched
    assert result.finish_reason == ("length" if matched is None else "stop")
    if matched is not None:
        kept = smollm2().decode(result.token_ids)
        end = len(expected) + (0 if include else len(matched))
        assert len(smollm2().decode(result.token_ids[:-1]).rstrip("\ufffd")) < end <= len(kept)
        assert result.token_ids == ids[: len(result.token_ids)]


def test_a_stop_string_asks_for_an_abort_and_ends_everything():
    subject = processor(stop="France")
    ids = tokens("The capital of France is Paris.")
    delta = subject.push(TokenDelta("r", ids))
    assert delta.text == "The capital of "
    assert (delta.finish_reason, delta.stop_reason) == ("stop", "France")
    assert list(delta.token_ids) == tokens("The capital of France")
    assert subject.must_abort
    assert subject.finished
    later = subject.push(TokenDelta("r", ids, finish_reason="abort"))
    assert (later.text, list(later.token_ids), later.finish_reason) == ("", [], "stop")
    assert subject.result().text == "The capital of "


def test_no_abort_when_the_engine_ended_by_itself():
    subject = processor(stop="France")
    subject.push(TokenDelta("r", tokens("of France"), finish_reason="length"))
    assert subject.result().stop_reason == "France"
    assert not subject.must_abort


def test_text_held_back_comes_out_at_the_end():
    subject = processor(stop="Paris!")
    deltas = run(subject, tokens("is Paris"), [1])
    assert "".join(delta.text for delta in deltas) == "is Paris"
    assert subject.result().stop_reason is None


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({}, "Hi"),
        ({"skip_special_tokens": False}, "Hi"),
        ({"skip_special_tokens": False, "include_stop_str_in_output": True}, "Hi<|im_end|>"),
        ({"stop": "zzz"}, "Hi"),
    ],
)
def test_the_token_that_stops_is_kept_as_token_only(params, text):
    subject = processor(**params)
    ids = [*tokens("Hi"), 2]
    subject.push(TokenDelta("r", ids, finish_reason="stop"))
    assert (subject.result().text, subject.result().token_ids) == (text, ids)


def test_stop_token_is_reported():
    subject = processor(stop_token_ids=[5])
    delta = subject.push(TokenDelta("r", [5], finish_reason="stop", stop_reason=5))
    assert (delta.stop_reason, subject.result().stop_reason) == (5, 5)


@pytest.mark.parametrize(("min_tokens", "text"), [(0, ""), (1, "a"), (2, "aa"), (3, "aaa")])
@pytest.mark.parametrize("cuts", [[], [1, 2, 3]])
def test_stop_strings_wait_for_min_tokens(min_tokens, text, cuts):
    token = tokens("a")
    assert len(token) == 1
    subject = processor(stop="a", min_tokens=min_tokens)
    run(subject, token * 5, cuts)
    assert subject.result().text == text
    assert len(subject.result().token_ids) == min_tokens + 1


def test_logprobs():
    a, b, c = tokens("a")[0], tokens("b")[0], tokens("c")[0]
    subject = processor(logprobs=2)
    first = subject.push(
        TokenDelta("r", [c], logprobs=[TokenLogprobs([c, a, b], [-3.0, -0.5, -1.0], 7)])
    )
    expected = {c: Logprob(-3.0, 7, "c"), a: Logprob(-0.5, 1, "a"), b: Logprob(-1.0, 2, "b")}
    assert first.logprobs == [expected]
    assert next(iter(first.logprobs[0])) == c
    second = subject.push(
        TokenDelta("r", [a], "length", logprobs=[TokenLogprobs([a, a, b], [-0.5, -0.5, -1.0], 1)])
    )
    assert second.logprobs == [{a: Logprob(-0.5, 1, "a"), b: Logprob(-1.0, 2, "b")}]
    result = subject.result()
    assert result.logprobs == first.logprobs + second.logprobs
    assert result.cumulative_logprob == -3.5


def test_a_sampled_token_among_equals_keeps_its_own_rank():
    subject = processor(logprobs=2)
    entry = TokenLogprobs([7, 5, 7], [-1.0, -1.0, -1.0], 1)
    (found,) = subject.push(TokenDelta("r", [7], logprobs=[entry])).logprobs
    assert [(token, each.rank) for token, each in found.items()] == [(7, 1), (5, 1)]


def test_logprobs_end_with_the_stop_string():
    ids = tokens("abc def ghi")
    subject = processor(logprobs=0, stop="def")
    entries = [TokenLogprobs([i], [-1.0], 1) for i in ids]
    delta = subject.push(TokenDelta("r", ids, logprobs=entries))
    assert [list(entry) for entry in delta.logprobs] == [[i] for i in delta.token_ids]
    assert len(delta.token_ids) < len(ids)
    assert subject.result().cumulative_logprob == -1.0 * len(delta.token_ids)


def test_no_logprobs_unless_asked():
    subject = processor()
    delta = subject.push(TokenDelta("r", [5], logprobs=[TokenLogprobs([5], [-1.0], 1)]))
    assert delta.logprobs is None
    assert subject.result().logprobs is None
    assert subject.result().cumulative_logprob is None
    assert subject.prompt_logprobs is None


def test_prompt_logprobs_come_in_pieces_and_begin_with_none():
    subject = processor(prompt_logprobs=1)
    for token in (100, 101):
        entry = TokenLogprobs([token, 5], [-2.0, -1.0], 3)
        subject.push(TokenDelta("r", [], prompt_logprobs=[entry]))
    assert subject.prompt_logprobs[0] is None
    assert [list(entry) for entry in subject.prompt_logprobs[1:]] == [[100, 5], [101, 5]]
    assert subject.prompt_logprobs[1][100].rank == 3


def test_prompt_logprobs_are_put_in_their_form_when_they_are_read(monkeypatch):
    subject, converted = processor(prompt_logprobs=0), []
    convert = output_processor._to_dict
    monkeypatch.setattr(
        output_processor, "_to_dict", lambda *args: converted.append(args[0]) or convert(*args)
    )
    entries = [TokenLogprobs([token], [-1.0], 1) for token in range(100, 104)]
    subject.push(TokenDelta("r", [], prompt_logprobs=entries[:2]))
    assert (converted, subject.num_prompt_logprobs) == ([], 3)
    assert [*subject.prompt_logprobs[2]] == [101]
    subject.push(TokenDelta("r", [], prompt_logprobs=entries[2:]))
    assert (len(converted), subject.num_prompt_logprobs) == (2, 5)
    assert [[*entry] for entry in subject.prompt_logprobs[1:]] == [[100], [101], [102], [103]]
    assert (converted, subject.num_prompt_logprobs) == (entries, 5)


def test_error_and_cached_tokens_are_passed_on():
    subject = processor(index=3)
    subject.push(TokenDelta("r", [5], num_cached_tokens=48))
    delta = subject.push(TokenDelta("r", [], "error", error="The engine stopped."))
    assert (delta.finish_reason, delta.error) == ("error", "The engine stopped.")
    assert subject.num_cached_tokens == 48
    assert (subject.result().index, subject.result().finished) == (3, True)


def test_the_end_within_a_character_shows():
    subject = processor()
    deltas = run(subject, tokens("a😀")[:-1], [1, 2])
    assert [delta.text for delta in deltas] == ["a", "", "\ufffd"]


def test_first_space_of_a_continuation_stays():
    tokenizer = sentencepiece_like()
    hello = tokenizer.encode("Hello", add_special_tokens=False)
    subject = OutputProcessor(tokenizer, SamplingParams(), hello)
    assert subject.push(TokenDelta("r", hello)).text == " Hello"


def test_without_tokenizer_tokens_pass():
    subject = OutputProcessor(None, SamplingParams(logprobs=0, stop="a"), PROMPT)
    delta = subject.push(TokenDelta("r", [5, 6], "length", None, [TokenLogprobs([5], [-1.0], 1)]))
    assert (delta.text, list(delta.token_ids)) == ("", [5, 6])
    assert delta.logprobs == [{5: Logprob(-1.0, 1, None)}]
    assert subject.result().finish_reason == "length"


def test_what_comes_with_a_prompt_that_is_only_scored_is_dropped():
    subject = processor(max_tokens=0, prompt_logprobs=0, logprobs=0)
    subject.push(TokenDelta("r", [], prompt_logprobs=[TokenLogprobs([100], [-0.5], 2)]))
    token = TokenDelta("r", [7], "stop", 7, logprobs=[TokenLogprobs([7], [-0.1], 1)])
    assert subject.push(token).finish_reason == "length"
    result = subject.result()
    assert (result.text, result.token_ids, result.logprobs) == ("", [], [])
    assert (result.finish_reason, result.stop_reason) == ("length", None)
    assert [*subject.prompt_logprobs[1]] == [100]
