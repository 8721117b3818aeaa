"""JSON in pieces is read as `json` reads the whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.protocols.json_scan import JsonValue

QUIET = settings(deadline=None, derandomize=True, database=None)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(-1e300, 1e300),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
cuts = st.lists(st.integers(0, 1000))


def divide(text: str, cuts: Sequence[int]) -> list[str]:
    """The text in pieces, divided wherever the cuts, modulo its length, fall."""
    places = sorted({cut % (len(text) + 1) for cut in cuts})
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def read(text: str, cuts: Sequence[int]) -> tuple[int, bool, bool]:
    value, count = JsonValue(), 0
    for piece in divide(text, cuts):
        count += value.feed(piece)
        if value.done or value.failed:
            break
    return count, value.done, value.failed


@settings(QUIET)
@given(json_values, cuts, st.booleans())
def test_a_value_ends_where_it_ends(value: Any, cuts: list[int], ascii: bool):
    text = json.dumps(value, ensure_ascii=ascii)
    assert read(text + " x", cuts) == (len(text), True, False)


@settings(QUIET, max_examples=1000)
@given(st.text('{}[]":,\\u019atrue-. \n', max_size=14), cuts)
def test_what_is_taken_is_json_and_what_is_json_is_taken(text: str, cuts: list[int]):
    text = "[" + text
    count, done, failed = read(text, cuts)
    assert (count, done, failed) == read(text, [])
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except ValueError:
        assert not done
    else:
        assert (done, count) == (True, end)


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ('{"a": 1,}', '{"a": 1,'),
        ("{'a': 1}", "{"),
        ('{"a" 1}', '{"a" '),
        ("[1 2]", "[1 "),
        ("[truth]", "[truth"),
        ("[01]", "[01"),
        ('["\n"]', '["'),
        ('["\\x"]', '["\\'),
        ('["\\u12g4"]', '["\\u12'),
        ("[}", "["),
        ("}", ""),
    ],
)
def test_fails_at_the_first_character_that_cannot_be(text: str, good: str):
    for step in (1, len(text)):
        assert read(text, range(0, len(text), step)) == (len(good), False, True)
