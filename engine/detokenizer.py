"""Text from tokens as they come, and stop strings in it. Imports no torch."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from engine.tokenizer import Tokenizer

_PROMPT_TAIL = 16
"""Prompt tokens looked at: what matters is the last character, and whether there is any text."""

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class IncrementalDetokenizer:
    """Turns a growing sequence of tokens into text, one push at a time.

    The pushed texts, with `flush`'s at the end, make up `Tokenizer.decode` of all tokens, however
    they were divided. A push gives whole characters only; the bytes of an unfinished one wait.

    Args:
        tokenizer: of the model.
        skip_special_tokens: leave special tokens out of the text.
        prompt_token_ids: what came before; a character begun there is completed, and the space that
            SentencePiece puts at the start of a text is left out only where the text does start.
    """

    __slots__ = ("_at_start", "_bytes_of", "_decoder")

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        prompt_token_ids: Sequence[int] = (),
    ) -> None:
        self._bytes_of = tokenizer.token_bytes(skip_special_tokens).__getitem__
        self._decoder = _Utf8Decoder("replace")
        tail_bytes = map(tokenizer.token_bytes(True).__getitem__, prompt_token_ids[-_PROMPT_TAIL:])
        tail = b"".join(tail_bytes)
        self._decoder.decode(tail)
        self._at_start = tokenizer.strips_space and not tail

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that these further tokens complete; bytes that are not UTF-8 become U+FFFD."""
        data = b"".join(map(self._bytes_of, token_ids))
        if self._at_start and data:
            data = data.removeprefix(b" ")
            self._at_start = False
        if data.isascii() and not self._decoder.buffer:
            return data.decode()  # the same, and faster than what can wait for a character's end
        return self._decoder.decode(data)

    def flush(self) -> str:
        """U+FFFD if the tokens end within a character, else nothing. Push no more after it."""
        return self._decoder.decode(b"", final=True)


class StopStringMatcher:
    """Finds stop strings in a text that comes in pieces.

    The match that is complete first wins; of those complete at the same character, the longest.
    That depends on the text alone, not on its division into pieces.

    Args:
        stop: the stop strings, none of them empty.
        include_stop: leave the stop string in the text.

    Attributes:
        matched: the stop string found, or None. Nothing may be pushed after a match.
    """

    __slots__ = ("_held", "_include_stop", "_stop", "matched")

    def __init__(self, stop: Sequence[str], include_stop: bool = False) -> None:
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str, check: bool = True) -> str:
        """Text that may be handed out now that `text` has come.

        Args:
            text: the next piece.
            check: look for stop strings that end within this piece; one that ends in an unchecked
                piece is ordinary text.

        Returns:
            What cannot belong to a stop string any more; up to the stop string (or its end, under
            `include_stop`) when `matched` is set.
        """
        before = len(self._held)
        text = self._held + text
        if check and (found := self._find(text, before)) is not None:
            start, self.matched = found
            self._held = ""
            return text[: start + len(self.matched)] if self._include_stop else text[:start]
        cut = self._hold_from(text)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """Text held back, when no more will come."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str, before: int) -> tuple[int, str] | None:
        """Start and text of the winning match among those that end after `before` characters."""
        found = None
        first_end = len(text) + 1
        for stop in self._stop:
            start = text.find(stop, max(0, before + 1 - len(stop)), first_end)
            if start < 0:
                continue
            end = start + len(stop)
            if found is None or (end, start) < (first_end, found[0]):
                found, first_end = (start, stop), end
        return found

    def _hold_from(self, text: str) -> int:
        """Where the longest tail begins that a stop string might begin with."""
        hold = len(text)
        for stop in self._stop:
            start = text.find(stop[0], max(0, len(text) + 1 - len(stop)), hold)
            while start >= 0:
                if stop.startswith(text[start:]):
                    hold = start
                    break
                start = text.find(stop[0], start + 1, hold)
        return hold
