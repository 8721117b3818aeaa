"""Following JSON that comes in pieces, which `json` cannot do: it takes whole texts only."""

from __future__ import annotations

import re
from typing import Literal

WHITESPACE = " \t\n\r"

_SCALAR = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?|true|false|null")
_SCALAR_END = re.compile(r"[^-+.0-9A-Za-z]")
_STRING_STOP = re.compile(r'["\\\x00-\x1f]')
_HEX = frozenset("0123456789abcdefABCDEF")

_Expected = Literal["value", "value or end", "key", "key or end", "colon", "comma or end"]


class JsonValue:
    """Follows one JSON value (RFC 8259) through any division of its text into pieces.

    Attributes:
        done: the value has ended.
        failed: what has come cannot be JSON.
    """

    def __init__(self) -> None:
        self.done = False
        self.failed = False
        self._open: list[str] = []
        """The brackets that are still to be closed, by what closes them."""
        self._expected: _Expected = "value"
        self._in_string = False
        self._is_key = False
        self._escape = 0
        """Characters still to come of an escape in a string; its first counts as one more."""
        self._scalar = ""
        """A number or a literal so far."""

    def feed(self, text: str, start: int = 0) -> int:
        """Take the next piece.

        Args:
            text: holds the piece.
            start: where in it the piece begins.

        Returns:
            Where the value ended or failed, or the end of the text. A number ends only at the
            character behind it.
        """
        at = start
        while at < len(text) and not self.done and not self.failed:
            if self._in_string:
                at = self._read_string(text, at)
            elif self._scalar:
                at = self._read_scalar(text, at)
            else:
                at = self._read_structure(text, at)
        return at

    def _read_string(self, text: str, at: int) -> int:
        if self._escape:
            return self._read_escape(text, at)
        found = _STRING_STOP.search(text, at)
        if found is None:
            return len(text)
        stop, end = found.group(), found.end()
        if stop == '"':
            self._in_string = False
            self._end_item()
        elif stop == "\\":
            self._escape = 5
        else:
            self.failed = True
            return found.start()
        return end

    def _read_escape(self, text: str, at: int) -> int:
        char = text[at]
        if self._escape < 5 and char in _HEX:
            self._escape -= 1
        elif self._escape == 5 and char == "u":
            self._escape = 4
        elif self._escape == 5 and char in '"\\/bfnrt':
            self._escape = 0
        else:
            self.failed = True
            return at
        return at + 1

    def _read_scalar(self, text: str, at: int) -> int:
        found = _SCALAR_END.search(text, at)
        end = len(text) if found is None else found.start()
        self._scalar += text[at:end]
        if found is not None:
            self._end_scalar()
        return end

    def _end_scalar(self) -> None:
        if _SCALAR.fullmatch(self._scalar) is None:
            self.failed = True
        else:
            self._scalar = ""
            self._end_item()

    def _read_structure(self, text: str, at: int) -> int:
        char, expected = text[at], self._expected
        if char in WHITESPACE:
            return at + 1
        if expected in ("value", "value or end") and self._begin_value(char):
            return at + 1
        if char == '"' and expected in ("key", "key or end"):
            self._in_string = self._is_key = True
        elif char == ":" and expected == "colon":
            self._expected = "value"
        elif char == "," and expected == "comma or end":
            self._expected = "key" if self._open[-1] == "}" else "value"
        elif expected.endswith("or end") and char == self._open[-1]:
            self._open.pop()
            self._end_item()
        else:
            self.failed = True
            return at
        return at + 1

    def _begin_value(self, char: str) -> bool:
        if char == '"':
            self._in_string = True
        elif char == "{":
            self._open.append("}")
            self._expected = "key or end"
        elif char == "[":
            self._open.append("]")
            self._expected = "value or end"
        elif _SCALAR_END.match(char) is None:
            self._scalar = char
        else:
            return False
        return True

    def _end_item(self) -> None:
        """A string, number, literal, object or list has ended."""
        if self._is_key:
            self._is_key = False
            self._expected = "colon"
        elif self._open:
            self._expected = "comma or end"
        else:
            self.done = True
