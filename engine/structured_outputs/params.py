"""What a caller may ask of the form of an output; names follow vLLM's `StructuredOutputsParams`.

Imports no torch: the ingress checks requests with it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from engine.errors import InvalidRequest
from engine.structured_outputs.json_schema import check_schema

MAX_GRAMMAR_LENGTH = 1 << 17
"""Most characters of a schema, a regular expression, a grammar, or all choices together."""
MAX_CHOICES = 1000

KINDS = ("json", "regex", "choice", "grammar", "json_object")
"""Fields of which exactly one is given."""


class GrammarSource(msgspec.Struct, frozen=True):
    """What is compiled; equal sources share a compiled grammar."""

    kind: str
    """`json`, `regex` or `grammar`."""
    text: str
    any_whitespace: bool = True
    """Whether JSON may have white space between its tokens."""


class StructuredOutputsParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The form of an output: exactly one of `json`, `regex`, `choice`, `grammar`, `json_object`.

    Raises:
        InvalidRequest: none or several are given, or one is of a wrong type or too long.
    """

    json: str | dict[str, Any] | None = None
    """A JSON schema that the output is valid against; a mapping is turned into text."""
    regex: str | None = None
    """A regular expression that the whole output matches."""
    choice: Sequence[str] | None = None
    """The output is one of these texts."""
    grammar: str | None = None
    """A grammar in the notation of GBNF (llama.cpp's EBNF) whose rule `root` gives the output."""
    json_object: bool | None = None
    """The output is a JSON object."""
    disable_any_whitespace: bool = False
    """JSON without line breaks and indentation."""
    param: str = "structured_outputs"
    """Field by which the caller asked, which errors name."""

    def __post_init__(self) -> None:
        """Turn a schema into text, and check types and sizes."""
        if isinstance(self.json, dict):
            text = json.dumps(self.json, ensure_ascii=False, separators=(",", ":"))
            msgspec.structs.force_setattr(self, "json", text)
        given = [kind for kind in KINDS if getattr(self, kind) not in (None, False)]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise self._error(f"must have exactly one of {', '.join(KINDS)}, and has {found}.")
        if not isinstance(self.disable_any_whitespace, bool):
            raise self._error("disable_any_whitespace must be true or false.")
        self._check_type(given[0])

    def check(self) -> None:
        """Check what takes longer than types; whoever takes requests in does so, once for each.

        Raises:
            InvalidRequest: a schema is not JSON, or asks for what would not be kept.
        """
        if isinstance(self.json, str):
            try:
                check_schema(self.json)
            except ValueError as error:
                raise self._error(f"the JSON schema {error}") from None

    def source(self) -> GrammarSource:
        """What to compile."""
        if self.regex is not None:
            return GrammarSource("regex", self.regex)
        if self.grammar is not None:
            return GrammarSource("grammar", self.grammar)
        if self.choice is not None:
            # A JSON string is spelled as a grammar's literal is.
            literals = " | ".join(json.dumps(text, ensure_ascii=False) for text in self.choice)
            return GrammarSource("grammar", f"root ::= {literals}")
        schema = self.json if isinstance(self.json, str) else '{"type":"object"}'
        return GrammarSource("json", schema, not self.disable_any_whitespace)

    def _check_type(self, kind: str) -> None:
        value = getattr(self, kind)
        texts = value if kind == "choice" else [value]
        if kind == "json_object":
            if value is not True:
                raise self._error("json_object must be true or false.")
            return
        if not isinstance(texts, (list, tuple)) or not texts or len(texts) > MAX_CHOICES:
            raise self._error(f"choice must be a list of 1 to {MAX_CHOICES} texts.")
        if not all(isinstance(text, str) and text for text in texts):
            what = "texts" if kind == "choice" else "a text"
            raise self._error(f"{kind} must be {what}, and not empty.")
        if sum(map(len, texts)) > MAX_GRAMMAR_LENGTH:
            raise self._error(f"{kind} may have up to {MAX_GRAMMAR_LENGTH} characters.")

    def _error(self, message: str) -> InvalidRequest:
        return InvalidRequest(f"{self.param}: {message}", self.param)
