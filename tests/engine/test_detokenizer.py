import itertools
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.detokenizer import IncrementalDetokenizer, StopStringMatcher
from tests.engine.tokenizer_cases import (
    CORPUS,
    TEXTS,
    bare_metaspace_like,
    metaspace_like,
    sentencepiece_like,
    smollm2,
)

TOKENIZERS = [smollm2, sentencepiece_like, metaspace_like, bare_metaspace_like]


def pieces_of(items, cuts):
    """Divide a sequence at the given places."""
    edges = [0, *sorted(min(cut, len(items)) for cut in cuts), len(items)]
    return [items[a:b] for a, b in itertools.pairwise(edges)]


def stream(tokenizer, pieces, skip=True, prompt=()):
    detokenizer = IncrementalDetokenizer(tokenizer, skip, prompt)
    return [*(detokenizer.push(piece) for piece in pieces), detokenizer.flush()]


@pytest.mark.parametrize("make", TOKENIZERS)
@pytest.mark.parametrize("text", CORPUS)
def test_token_by_token_equals_one_shot_and_never_breaks_a_character(make, text):
    tokenizer = make()
    ids = tokenizer.encode(text, add_special_tokens=False)
    texts = stream(tokenizer, [[i] for i in ids])
    library = tokenizer._backend.decode(ids)
    assert "".join(texts) == tokenizer.decode(ids) == library
    assert library.lstrip(" ") == text.lstrip(" ")  # a first space may be taken for the added one
    assert not any("\ufffd" in piece for piece in texts)


@pytest.mark.parametrize("make", TOKENIZERS)
@settings(max_examples=200, deadline=None)
@given(data=st.data(), skip=st.booleans(), cuts=st.lists(st.integers(0, 40), max_size=10))
def test_any_division_of_any_tokens_equals_one_shot(make, data, skip, cuts):
    """Random tokens hold broken UTF-8, special tokens anywhere and ids beyond the vocabulary."""
    tokenizer = make()
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 5), max_size=40))
    texts = stream(tokenizer, pieces_of(ids, cuts), skip)
    assert "".join(texts) == tokenizer.decode(ids, skip)


def test_a_character_waits_for_its_last_byte():
    tokenizer = smollm2()
    ids = tokenizer.encode("😀")
    assert len(ids) > 1
    assert stream(tokenizer, [[i] for i in ids]) == [""] * (len(ids) - 1) + ["😀", ""]


def test_the_end_within_a_character_shows():
    tokenizer = smollm2()
    assert stream(tokenizer, [tokenizer.encode("a😀")[:-1]]) == ["a", "\ufffd"]


def test_invalid_bytes_do_not_hold_back_what_follows():
    tokenizer = sentencepiece_like()
    ids = [3 + 0xF0, 3 + 0x9F, 3 + ord("a"), 3 + 0xFF, 3 + ord("b")]
    assert stream(tokenizer, [[i] for i in ids]) == ["", "", "\ufffda", "\ufffd", "b", ""]


def test_special_tokens_are_left_out_only_when_asked():
    tokenizer = smollm2()
    ids = tokenizer.encode("a<|im_end|>b")
    assert stream(tokenizer, [[i] for i in ids]) == ["a", "", "b", ""]
    assert stream(tokenizer, [ids], skip=False)[0] == "a<|im_end|>b"


def test_the_first_space_stays_when_a_prompt_came_before():
    tokenizer = sentencepiece_like()
    hello, bos = tokenizer.encode("Hello", add_special_tokens=False), 1
    texts = {
        prompt: "".join(stream(tokenizer, [[]] + [[i] for i in hello], prompt=prompt))
        for prompt in [(), (bos,), tuple(hello), (bos, 3 + ord("x"))]
    }
    assert list(texts.values()) == ["Hello", "Hello", " Hello", " Hello"]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(TEXTS), st.integers(0, 60))
def test_a_character_begun_in_the_prompt_is_completed(text, cut):
    """So that a stream goes on seamlessly when its tokens so far became another prompt."""
    tokenizer = smollm2()
    ids = tokenizer.encode("x" + text)
    first = IncrementalDetokenizer(tokenizer)
    before = first.push(ids[:cut])
    assert before + "".join(stream(tokenizer, [ids[cut:]], prompt=ids[:cut])) == "x" + text


def match(stop, pieces, include=False):
    matcher = StopStringMatcher(stop, include)
    out = ""
    for piece in pieces:
        out += matcher.push(piece)
        if matcher.matched is not None:
            return out, matcher.matched
    return out + matcher.flush(), None


def match_by_hand(stop, text, include=False):
    """Look at one character more at a time, and take the longest stop string that ends there."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            longest = max(ending, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@settings(max_examples=500, deadline=None)
@given(
    stop=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4),
    text=st.text("abc", max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=30),
    include=st.booleans(),
)
def test_stop_strings_are_found_however_the_text_is_divided(stop, text, cuts, include):
    assert match(stop, pieces_of(text, cuts), include) == match_by_hand(stop, text, include)


@settings(max_examples=200, deadline=None)
@given(
    stop=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
    text=st.text("abc", max_size=20),
)
def test_no_more_is_held_back_than_could_begin_a_stop_string(stop, text):
    matcher = StopStringMatcher(stop)
    out = ""
    for end, char in enumerate(text, 1):
        out += matcher.push(char)
        if matcher.matched is not None:
            break
        held = text[len(out) : end]
        assert out + held == text[:end]
        tails = [text[:end][-n:] for n in range(1, 6)]
        begins = [t for t in tails if any(s != t and s.startswith(t) for s in stop)]
        assert len(held) == max(map(len, begins), default=0)


@pytest.mark.parametrize(
    ("stop", "text", "expected"),
    [
        (["\n\n"], "a\nb\n\nc", ("a\nb", "\n\n")),
        (["User:"], "hi Use User: x", ("hi Use ", "User:")),
        (["bc", "abcd"], "xabcd", ("xa", "bc")),  # complete first
        (["bcd", "abcd"], "xabcd", ("x", "abcd")),  # complete together: the longest
        (["aab"], "aaab", ("a", "aab")),
        (["終わり"], "これで終わり。", ("これで", "終わり")),
        (["zzz"], "azz", ("azz", None)),
    ],
)
def test_stop_string_cases(stop, text, expected):
    assert match(stop, [text]) == expected
    assert match(stop, list(text)) == expected


def test_unchecked_pieces_are_text_even_with_a_stop_string_in_them():
    matcher = StopStringMatcher(["ab"])
    assert matcher.push("xab", check=False) == "xab"
    assert matcher.push("a", check=False) == ""
    assert matcher.push("b.") == ""  # began unchecked, but ends in a checked piece
    assert matcher.matched == "ab"


def test_a_stop_string_that_ended_unchecked_is_not_found_later():
    matcher = StopStringMatcher(["ab", "abc"])
    assert matcher.push("ab", check=False) == ""  # may begin "abc"
    assert matcher.push("x") == "abx"
    assert matcher.matched is None


def test_no_stop_strings_make_a_character_dear():
    """Strings that nearly begin at every character of what is held back."""
    stop = [("a" + "b" * 1022 + str(i))[:1024] for i in range(31)] + ["a" * 1023 + "c"]
    matcher, calls = StopStringMatcher(stop), Counter()
    matcher.push("a" * 1100)
    sys.setprofile(lambda frame, event, argument: calls.update([event]))
    try:
        for _ in range(10):
            matcher.push("a")
    finally:
        sys.setprofile(None)
    assert calls["call"] + calls["c_call"] < 10 * 10 * len(stop)
