"""Text from tokens as they come, and stop strings in it. Imports no torch."""

from __future__ import annotations

import codecs
from array import array
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

    __slots__ = ("_held", "_include_stop", "_searches", "matched")

    def __init__(self, stop: Sequence[str], include_stop: bool = False) -> None:
        self._searches = [_Search(each) for each in stop]
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
        ends = [(search.push(text, check), search.stop) for search in self._searches]
        text = self._held + text
        found = [(end, -len(stop), stop) for end, stop in ends if end]
        if found:
            end, _, self.matched = min(found)
            end += before
            self._held = ""
            return text[:end] if self._include_stop else text[: end - len(self.matched)]
        cut = len(text) - max((search.length for search in self._searches), default=0)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """Text held back, when no more will come."""
        held, self._held = self._held, ""
        return held


class _Search:
    """Finds one string in a text that comes in pieces, by Knuth, Morris and Pratt's algorithm
    (Fast pattern matching in strings, 1977): whatever strings and texts clients think of, a
    character costs the same.

    Attributes:
        stop: the string.
        length: so many characters of its beginning does the text end with; less than all.
    """

    __slots__ = ("_borders", "length", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.length = 0
        self._borders = array("I", (0, 0))
        """At i: how long the longest proper prefix of `stop[:i]` is that ends it as well. As far
        as the text has come yet."""

    def push(self, text: str, check: bool) -> int:
        """Go on in the text; stops behind the first occurrence that ends here, under `check`.

        Returns:
            Where that ends in `text`, or 0.
        """
        stop, length = self.stop, self.length
        if length == 0 and stop[0] not in text:
            return 0
        for end, character in enumerate(text, 1):
            length = self._extend(length, character)
            if length == len(stop):
                if check:
                    return end
                length = self._borders[length]
        self.length = length
        return 0

    def _extend(self, length: int, character: str) -> int:
        """What becomes of a match of the first `length` characters with one more of the text."""
        stop, borders = self.stop, self._borders
        while length and stop[length] != character:
            length = borders[length]
        if stop[length] == character:
            length += 1
            if length == len(borders):
                borders.append(self._extend(borders[-1], character))
        return length
