"""Text for narrow terminals."""

from __future__ import annotations

import random

import pytest

from deployments.cli.terminal import WordWrap, columns, printable

TEXT = (
    "The trunk carries every token of an engine at once, and a_word_that_is_far_too_long_for_a_"
    "line_of_a_phone must break.\n\n    return x  # indented\n"
    "これは日本語の文章で、空白がありません。終わり"
)


def wrapped(text: str, limit: int, seed: int | None = None) -> str:
    wrap, rng, out = WordWrap(limit), random.Random(seed), ""
    while text:
        size = len(text) if seed is None else rng.randint(1, 7)
        out += wrap.feed(text[:size])
        text = text[size:]
    return out + wrap.end()


@pytest.mark.parametrize("limit", [20, 33, 40])
def test_lines_fit_and_lose_nothing(limit):
    lines = wrapped(TEXT, limit).split("\n")
    assert max(map(columns, lines)) <= limit
    assert "".join("".join(lines).split()) == "".join(TEXT.split())
    assert "    return x  # indented" in lines or limit < 24


def test_words_stay_whole():
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
    assert wrapped(" ".join(words), 20).split() == words


@pytest.mark.parametrize("seed", range(5))
def test_pieces_do_not_matter(seed):
    assert wrapped(TEXT, 40, seed) == wrapped(TEXT, 40)


def test_a_word_comes_once_it_has_ended():
    wrap = WordWrap(40)
    assert [wrap.feed(piece) for piece in ("He", "llo", " ", "wor")] == ["", "", "Hello", ""]
    assert wrap.end() == " wor"


def test_wide_characters_take_two_columns_and_marks_none():
    assert columns("日本e\u0301") == 5


def test_a_model_cannot_steer_the_terminal():
    assert printable("a\x1b[2Jb\x07\x9bc\r\n\td") == "a[2Jbc\n\td"
