"""What a row of the table of compatibility says, and how one finds out whether it is true."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from engine.request import EngineRequest

PASSING = frozenset(("id", "created", "created_at", "completed_at", "item_id", "response_id"))
"""Fields of answers that differ each time."""


@dataclass
class Seen:
    """What came of a request with a field."""

    answer: Any
    """The answer, or a list of the events of a stream."""
    request: EngineRequest
    """What the engine was asked."""
    ask: Callable[[], Any]
    """Sends the request once more, and returns the answer."""
    ask_without: Callable[[], Any]
    """Sends it without the field."""

    @cached_property
    def without(self) -> Any:
        """What the same request without the field is answered."""
        return self.ask_without()


@dataclass(frozen=True)
class Case:
    """A value of a field, sent beside other fields, and what is expected of it."""

    value: Any
    beside: dict[str, Any]
    works: Callable[[Seen], bool] | None = None
    """Tells whether the effect is there. None for a value that is to have none or is refused."""
    refused_for: str | None = None
    """The field that the refusal names; None when there is to be none."""
    slow: bool = False
    is_invalid: bool = False
    """Whether the others refuse it as well."""

    @property
    def verdict(self) -> str:
        if self.refused_for is not None:
            return "refused"
        return "no effect" if self.works is None else "yes"


@dataclass(frozen=True)
class Row:
    """A field of an endpoint."""

    field: str
    cases: tuple[Case, ...]
    note: str = ""

    @property
    def verdict(self) -> str:
        """A value that is refused outweighs one that asks for nothing."""
        verdicts = {case.verdict for case in self.cases if not case.is_invalid}
        if {"yes", "refused"} <= verdicts:
            return "in part"
        return next(word for word in ("yes", "refused", "no effect") if word in verdicts)


@dataclass(frozen=True)
class Table:
    """The fields of an endpoint.

    `openai` and `vllm` name the fields that their endpoint of this path has.
    """

    path: str
    base: dict[str, Any]
    openai: frozenset[str]
    vllm: frozenset[str]
    rows: tuple[Row, ...] = field(default=())

    def without(self, case: Case, row: Row) -> dict[str, Any]:
        return {k: v for k, v in {**self.base, **case.beside}.items() if k != row.field}


def row(name: str, *cases: Case, note: str = "") -> Row:
    named = (replace(case, refused_for=name) if case.refused_for == "" else case for case in cases)
    return Row(name, tuple(named), note)


def works(value: Any, check: Callable[[Seen], bool], *, slow: bool = False, **beside: Any) -> Case:
    """The value has the effect that `check` looks for."""
    return Case(value, beside, check, slow=slow)


def refused(value: Any, param: str = "", **beside: Any) -> Case:
    """The value is answered by a 400 that names the field, or `param`."""
    return Case(value, beside, refused_for=param)


def invalid(value: Any, param: str = "", **beside: Any) -> Case:
    """The value is answered so, and by the others too."""
    return Case(value, beside, refused_for=param, is_invalid=True)


def ignored(value: Any, **beside: Any) -> Case:
    """The value changes nothing in the answer."""
    return Case(value, beside)


def lasting(answer: Any, *without: str) -> Any:
    """An answer without what differs each time and the fields named."""
    left_out = PASSING.union(without)
    if isinstance(answer, dict):
        return {k: lasting(v, *without) for k, v in answer.items() if k not in left_out}
    return [lasting(v, *without) for v in answer] if isinstance(answer, list) else answer


def text(answer: Any) -> str:
    """The text of an answer, of whatever endpoint, streamed or not."""
    if isinstance(answer, list):
        return "".join(map(_delta, answer))
    if "output" in answer:
        return str(answer["output"][-1]["content"][0]["text"])
    (choice, *_) = answer["choices"]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def _delta(event: dict[str, Any]) -> str:
    if event.get("type") == "response.output_text.delta":
        return str(event["delta"])
    for choice in event.get("choices", ()):
        return str(choice.get("text") or choice.get("delta", {}).get("content") or "")
    return ""


def used(answer: Any, what: str) -> int:
    """The number of `prompt` or `completion` tokens of an answer."""
    usage = answer["usage"]
    older = {"prompt": "input_tokens", "completion": "output_tokens"}
    return int(usage.get(f"{what}_tokens", usage.get(older[what], 0)))


def ends(answer: Any) -> str:
    """Why an answer ended, in the words of chats."""
    if "output" in answer:
        return "length" if answer["status"] == "incomplete" else "stop"
    return str(answer["choices"][0]["finish_reason"])


def differs(seen: Seen) -> bool:
    return text(seen.answer) != text(seen.without)


def is_json(seen: Seen) -> bool:
    try:
        return isinstance(json.loads(text(seen.answer)), dict)
    except ValueError:
        return False
