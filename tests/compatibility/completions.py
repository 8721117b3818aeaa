"""Rows of `/v1/completions`."""

from __future__ import annotations

from typing import Any

from tests.compatibility.generation import generation_rows
from tests.compatibility.rows import ignored, invalid, refused, row, text, used, works

PROMPT = "ab ab"


def tokens(answer: Any) -> list[str]:
    """Those that have log-probabilities."""
    found: list[str] = answer["choices"][0]["logprobs"]["tokens"]
    return found


COMPLETION_ROWS = (
    row("model", works("m", lambda seen: seen.answer["model"] == "m"), note="Must be given."),
    row(
        "prompt",
        works("xy", lambda seen: used(seen.answer, "prompt") == 3),
        works(["x", "y"], lambda seen: len(seen.answer["choices"]) == 2),
        works([70, 71], lambda seen: used(seen.answer, "prompt") == 2),
        works([[70], [71]], lambda seen: len(seen.answer["choices"]) == 2),
        invalid(""),
    ),
    row(
        "echo",
        works(True, lambda seen: text(seen.answer).startswith(PROMPT)),
        works(True, lambda seen: len(tokens(seen.answer)) == 4 + 4, logprobs=1),
        works(True, lambda seen: text(seen.answer) == PROMPT, max_tokens=0),
    ),
    row(
        "logprobs",
        works(2, lambda seen: len(seen.answer["choices"][0]["logprobs"]["top_logprobs"]) == 4),
        note="Up to 20; OpenAI's end at 5.",
    ),
    row(
        "best_of",
        ignored(1),
        refused(2),
        note="400 unless it is 1.",
    ),
    row("suffix", ignored(""), refused("x"), note="400 unless it is empty."),
    row(
        "add_special_tokens",
        works(False, lambda seen: used(seen.answer, "prompt") == used(seen.without, "prompt") - 1),
    ),
    row("prompt_embeds", refused("AAAA")),
    *generation_rows(logprobs=1),
)
