"""What a chat answer's text turns out to be, in the order in which it comes."""

from __future__ import annotations

from typing import NamedTuple


class Text(NamedTuple):
    """More of the message's content."""

    text: str


class Reasoning(NamedTuple):
    """More of what the model thought before it answered."""

    text: str


class CallBegin(NamedTuple):
    """A call of a function begins."""

    name: str


class CallArguments(NamedTuple):
    """More of the JSON text of the arguments of the call that began last."""

    text: str


class CallBroken(NamedTuple):
    """The call that began last is not valid JSON after all, or was cut off.

    Whoever can should take it back and show `source` as content. Whatever follows it in the answer
    is told of by further events.
    """

    source: str
    """All of the answer's text that the call was read from."""


Event = Text | Reasoning | CallBegin | CallArguments | CallBroken
