"""Finds calls of functions in the text of an answer that comes in pieces."""

from __future__ import annotations

import re
from collections.abc import Container
from typing import ClassVar

from deployments.protocols.json_scan import WHITESPACE
from deployments.protocols.marks import overlap
from deployments.protocols.message_events import CallBroken, Event, Text
from deployments.protocols.tool_parsers.call_reader import CallReader

_BLANK = re.compile(f"[{WHITESPACE}]+")


class ToolCallParser:
    """Base of the parsers; a subclass says what stands around the JSON objects of calls.

    The events depend on the text alone, not on how it was divided. What is not a call is content,
    whitespace before and behind calls left out. What begins like a call and is none is content
    too, or, where some of it has been handed out, a `CallBroken`.

    Args:
        names: of the functions that the model was told of.
    """

    opening: ClassVar[str]
    """Stands before a call."""
    closing: ClassVar[str] = ""
    """Stands behind a call; may be missing."""
    between: ClassVar[str] = WHITESPACE
    """Characters that mean nothing between calls."""
    bare: ClassVar[bool] = False
    """Whether an object is a call also without `opening`: at the start, and behind a call."""
    only_known: ClassVar[bool] = False
    """Whether an object that names another function is content."""

    def __init__(self, names: Container[str]) -> None:
        self._names = names if self.only_known else None
        self._reader: CallReader | None = None
        self._read: list[str] = []
        """What `_reader` was fed, and what stood before it."""
        self._in_gap = True
        """Nothing but what may stand before a call has come since the start or the last call."""
        self._num_calls = 0
        self._blank: list[str] = []
        """Whitespace in the gap."""
        self._held = ""
        """The end of the text so far, when `opening` or `closing` might begin there."""
        self._events: list[Event] = []

    def push(self, text: str) -> list[Event]:
        """What the next piece of the text tells."""
        text, self._held, at = self._held + text, "", 0
        while at < len(text):
            if self._reader is not None:
                at = self._read_call(self._reader, text, at)
            elif self._in_gap:
                at = self._read_gap(text, at)
            else:
                at = self._read_text(text, at)
        return self._take()

    def finish(self) -> list[Event]:
        """What is left to tell when no more will come."""
        if self._reader is not None:
            self._leave_call(self._reader)
        elif not (self._in_gap and self._num_calls and self.closing.startswith(self._held)):
            self._add_text("".join([*self._blank, self._held]))
        return self._take()

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _add_text(self, text: str) -> None:
        if text:
            self._events.append(Text(text))

    def _read_text(self, text: str, at: int) -> int:
        found = text.find(self.opening, at)
        if found >= 0:
            self._add_text(text[at:found])
            self._enter_call(self.opening)
            return found + len(self.opening)
        end = len(text) - overlap(text[at:], self.opening)
        self._add_text(text[at:end])
        self._held = text[end:]
        return len(text)

    def _read_gap(self, text: str, at: int) -> int:
        char = text[at]
        for mark in (self.opening, self.closing if self._num_calls else ""):
            if mark and text.startswith(mark, at):
                if mark == self.opening:
                    self._enter_call(mark)
                return at + len(mark)
            if mark and mark.startswith(text[at : at + len(mark)]):
                self._held = text[at:]
                return len(text)
        if self.bare and char == "{":
            self._enter_call("")
        elif found := _BLANK.match(text, at):
            self._blank.append(found.group())
            return found.end()
        elif self._num_calls and char in self.between:
            return at + 1
        else:
            self._in_gap = False
            self._add_text("".join(self._blank))
            self._blank = []
        return at

    def _enter_call(self, mark: str) -> None:
        self._reader = CallReader(self._names)
        self._read = [*self._blank, mark]
        self._blank = []

    def _read_call(self, reader: CallReader, text: str, at: int) -> int:
        end = reader.feed(text, at)
        self._read.append(text[at:end])
        self._events += reader.take()
        if reader.done or reader.failed:
            self._leave_call(reader)
        return end

    def _leave_call(self, reader: CallReader) -> None:
        self._reader = None
        self._in_gap = reader.complete
        if reader.complete:
            self._num_calls += 1
        elif reader.begun:
            self._events.append(CallBroken("".join(self._read)))
        else:
            self._add_text("".join(self._read))
