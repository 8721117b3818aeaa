"""Reads one call, `{"name": …, "arguments": {…}}`, from text that comes in pieces."""

from __future__ import annotations

import json
from collections.abc import Container
from typing import Literal

from deployments.protocols.json_scan import WHITESPACE, JsonValue
from deployments.protocols.message_events import CallArguments, CallBegin, Event

ARGUMENT_KEYS = ("arguments", "parameters")
"""What models call the arguments."""


class CallReader:
    """Follows the JSON object of a call.

    Name and arguments may come in either order, and other keys beside them. Arguments are handed
    out as they come, once the name is known; they read exactly as the model wrote them.

    Args:
        names: of functions that may be called; None takes any.

    Attributes:
        done: the object has ended, and is a call.
        failed: what has come cannot be a call.
        complete: name and arguments are there, whatever may be missing behind them.
        begun: whether a `CallBegin` has been handed out.
    """

    def __init__(self, names: Container[str] | None = None) -> None:
        self.done = self.failed = self.complete = self.begun = False
        self._names = names
        self._expected: Literal["{", "key or }", "key", ":", "value", ", or }"] = "{"
        self._item: JsonValue | None = None
        self._key = ""
        self._texts: list[str] = []
        """Of the item that is being read, or of arguments that wait for the name."""
        self._name: str | None = None
        self._arguments: str | None = None
        self._events: list[Event] = []

    def feed(self, text: str, start: int = 0) -> int:
        """Take the next piece, from `start` in the text; returns where the call ended or failed,
        or the end of the text."""
        at = start
        while at < len(text) and not self.done and not self.failed:
            item = self._item
            at = self._read_mark(text, at) if item is None else self._read_item(item, text, at)
        return at

    def take(self) -> list[Event]:
        """What has been read since the last time."""
        events, self._events = self._events, []
        return events

    def _read_mark(self, text: str, at: int) -> int:
        char, expected = text[at], self._expected
        if char in WHITESPACE:
            return at + 1
        if expected == "value" or (char == '"' and expected.startswith("key")):
            self._item = JsonValue()
            self._texts = []
            return at
        if char == "}" and expected.endswith("}"):
            self._end_object()
        elif char == "{" and expected == "{":
            self._expected = "key or }"
        elif char == ":" and expected == ":":
            self._expected = "value"
        elif char == "," and expected == ", or }":
            self._expected = "key"
        else:
            self.failed = True
        return at if self.failed else at + 1

    def _read_item(self, item: JsonValue, text: str, at: int) -> int:
        end = item.feed(text, at)
        self._texts.append(text[at:end])
        self._stream_arguments()
        self.failed = item.failed
        if item.done:
            self._item = None
            self._end_item("".join(self._texts))
        return end

    def _stream_arguments(self) -> None:
        """Hand out what there is of arguments that are an object and whose name is known."""
        is_arguments = self._expected == "value" and self._key in ARGUMENT_KEYS
        if self.complete or not is_arguments or self._name is None:
            return
        if self.begun or self._texts[0].startswith("{"):
            self._hand_out("".join(self._texts))
            self._texts = []

    def _hand_out(self, arguments: str) -> None:
        if not self.begun and self._name is not None:
            self.begun = True
            self._events.append(CallBegin(self._name))
        if arguments:
            self._events.append(CallArguments(arguments))

    def _end_item(self, text: str) -> None:
        if self._expected != "value":
            self._key, self._expected = json.loads(text), ":"
            return
        self._expected = ", or }"
        if self.complete:
            return
        if self._key == "name":
            self._end_name(text)
        elif self._key in ARGUMENT_KEYS:
            self._end_arguments(text)
        if self._name is not None and self._arguments is not None:
            self._hand_out(self._arguments)
            self.complete = True

    def _end_name(self, text: str) -> None:
        name = _string(text)
        if not name or (self._names is not None and name not in self._names):
            self.failed = True
        else:
            self._name = name

    def _end_arguments(self, text: str) -> None:
        """Arguments that are not an object are none (null), or an object written as a string."""
        if self.begun or text.startswith("{"):
            self._arguments = text  # what has not been handed out yet
        elif text == "null":
            self._arguments = "{}"
        elif _is_object(inner := _string(text)):
            self._arguments = inner
        else:
            self.failed = True

    def _end_object(self) -> None:
        if self._name is None:
            self.failed = True
            return
        if not self.complete:
            self._hand_out("{}")
            self.complete = True
        self.done = True


def _string(text: str) -> str:
    """The value of a JSON string; of other JSON, and of what is no Unicode, an empty one."""
    value = json.loads(text) if text.startswith('"') else ""
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return ""
    return str(value)


def _is_object(text: str) -> bool:
    value = JsonValue()
    return text.startswith("{") and value.feed(text) == len(text) and value.done
