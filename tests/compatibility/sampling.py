"""Rows of the fields that ask the same on every endpoint that generates."""

from __future__ import annotations

from typing import Any

from tests.compatibility.rows import Row, Seen, differs, ends, is_json, row, text, used, works

D = 70
"""The token `d`; its neighbours are the other small letters."""
EOS, BOS = 2, 1
ALL_D: dict[str, Any] = {"logit_bias": {str(D): 100}}
MOSTLY_D: dict[str, Any] = {"logit_bias": {str(D): 1}}
"""Enough to be the likeliest: the random model's logits are small."""
TERSE: dict[str, Any] = {
    "logit_bias": {
        **{str(ord(character) - 30): 100 for character in "{}]"},
        **dict.fromkeys(("200", "201", "204", "223"), -100),
    }
}
"""Has JSON end soon, and without white space."""
RANDOM: dict[str, Any] = {"temperature": 1.0, "seed": 1}
SCHEMA = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}


def is_repeated(seen: Seen) -> bool:
    """Whether the same request has the same answer again, though it is not greedy."""
    return text(seen.ask()) == text(seen.answer) and differs(seen)


def held_to(expected: str) -> Any:
    return lambda seen: text(seen.answer) == expected


def sampling_rows(limit: str) -> tuple[Row, ...]:
    """The rows; `limit` is the field for the most tokens of the output."""
    long: dict[str, Any] = {limit: 64, **TERSE}
    return (
        row(
            "temperature",
            works(0, differs, seed=1),
            note="Up to 100; OpenAI's ends at 2.",
        ),
        row("top_p", works(1e-6, differs, **RANDOM)),
        row("top_k", works(1, differs, **RANDOM)),
        row("min_p", works(1.0, differs, **RANDOM)),
        row("frequency_penalty", works(2.0, differs, **MOSTLY_D)),
        row("presence_penalty", works(2.0, differs, **MOSTLY_D)),
        row("repetition_penalty", works(100.0, differs, **MOSTLY_D)),
        row(
            "logit_bias",
            works({str(D): 100}, lambda seen: text(seen.answer) == "dddd"),
            note="Up to 1,024 entries.",
        ),
        row(
            "seed",
            works(7, is_repeated, temperature=1.0),
            note="Fixes the noise; in another batch logits may still round differently.",
        ),
        *_ending_rows(),
        row(
            "structured_outputs",
            works({"choice": ["ab", "12"]}, lambda s: text(s.answer) in ("ab", "12"), slow=True),
            works({"json": SCHEMA}, is_json, slow=True, **long),
        ),
        row(
            "priority",
            works(5, lambda seen: seen.request.priority == 5),
            note="Orders what waits under `scheduling_policy: priority`. Without effect under other"
            " policies, where vLLM refuses it.",
        ),
        row("cache_salt", works("x", lambda seen: seen.request.cache_salt == "x")),
    )


def _ending_rows() -> tuple[Row, ...]:
    """What ends an output, and what is shown of its end."""
    return (
        row("stop", works("dd", lambda seen: ends(seen.answer) == "stop", **ALL_D)),
        row(
            "stop_token_ids",
            works([D], lambda seen: used(seen.answer, "completion") == 1, **ALL_D),
        ),
        row(
            "min_tokens",
            works(
                3,
                lambda seen: (
                    used(seen.without, "completion") == 1 and used(seen.answer, "completion") >= 3
                ),
                **ALL_D,
                stop_token_ids=[D],
            ),
        ),
        row(
            "ignore_eos",
            works(
                True,
                lambda seen: (ends(seen.without), ends(seen.answer)) == ("stop", "length"),
                logit_bias={str(EOS): 100},
            ),
        ),
        row(
            "include_stop_str_in_output",
            works(True, lambda seen: text(seen.answer).endswith("d"), **ALL_D, stop=["dd"]),
        ),
        row(
            "skip_special_tokens",
            works(
                False,
                lambda seen: "<s>" in text(seen.answer) and "<s>" not in text(seen.without),
                logit_bias={str(BOS): 100},
            ),
        ),
    )


def guided_rows(limit: str) -> tuple[Row, ...]:
    """vLLM's older names for forms of the output."""
    long: dict[str, Any] = {limit: 64, **TERSE}
    return (
        row("guided_json", works(SCHEMA, is_json, slow=True, **long)),
        row("guided_regex", works("ab", held_to("ab"), slow=True)),
        row("guided_choice", works(["ab"], held_to("ab"), slow=True)),
        row("guided_grammar", works('root ::= "ab"', held_to("ab"), slow=True)),
    )
