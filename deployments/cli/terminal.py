"""What a model writes, made fit for a terminal."""

from __future__ import annotations

import shutil
import sys
import unicodedata

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
NARROWEST = 20
"""Columns; on fewer, words are not kept together."""


def width() -> int:
    """Columns of the terminal."""
    return shutil.get_terminal_size().columns


def is_terminal() -> bool:
    """Whether a person types and reads."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def printable(text: str) -> str:
    """The text without control characters: a model must not be able to steer a terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def write(text: str) -> None:
    """Write what a model has written to stdout at once: as it is, unless that is a terminal."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def columns(text: str) -> int:
    """Columns that a text without line breaks takes."""
    return sum(map(_columns, text))


def _columns(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Cf", "Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


class WordWrap:
    """Breaks a text that comes in pieces between words. A word is held back until it has ended.

    Args:
        limit: columns of a line.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit if limit >= NARROWEST else sys.maxsize
        self._column = 0
        self._spaces = ""
        self._word = ""

    def feed(self, text: str) -> str:
        """What may be written now."""
        return "".join(map(self._take, printable(text).expandtabs(4)))

    def end(self) -> str:
        """What has been held back."""
        return self._flush()

    def _take(self, character: str) -> str:
        if character == "\n":
            done = self._flush() + "\n"
            self._column, self._spaces = 0, ""
            return done
        if character == " ":
            done = self._flush()
            self._spaces += " "
            return done
        # Scripts without spaces may break anywhere, and so must words that are longer than a line.
        alone = _columns(character) == 2 or columns(self._word) + 1 >= self._limit
        done = self._flush() if alone else ""
        self._word += character
        return done

    def _flush(self) -> str:
        if not self._word:
            return ""
        word, spaces = self._word, self._spaces
        self._word = self._spaces = ""
        if self._column and self._column + len(spaces) + columns(word) > self._limit:
            self._column = columns(word)
            return "\n" + word
        self._column += len(spaces) + columns(word)
        return spaces + word
