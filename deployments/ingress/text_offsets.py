"""Where tokens begin in a text: `text_offset` of text completions."""

from __future__ import annotations

from collections.abc import Iterable

from engine.detokenizer import IncrementalDetokenizer
from engine.job import Job
from engine.tokenizer import Tokenizer


class TextOffsets:
    """Counts the characters of a text token by token, however the tokens are divided.

    A token that begins a character which the next ones complete takes no room. Stop strings are
    text like any other here: which tokens are cut off with one is not known when the first of them
    are told of, so that the offsets of those may lie behind the end.

    Args:
        detokenizer: of the text; None where there is none.
        start: offset of the first token.
    """

    def __init__(self, detokenizer: IncrementalDetokenizer | None, start: int = 0) -> None:
        self._detokenizer = detokenizer
        self._next = start

    @classmethod
    def of_output(cls, tokenizer: Tokenizer | None, job: Job, start: int) -> TextOffsets:
        """For a completion of a job, read as the job reads it."""
        params = job.params
        if tokenizer is None or not params.detokenize:
            return cls(None, start)
        prompt = job.prompt_token_ids
        return cls(IncrementalDetokenizer(tokenizer, params.skip_special_tokens, prompt), start)

    def read(self, token_ids: Iterable[int]) -> list[int]:
        """Offsets of the next tokens."""
        offsets = []
        for token in token_ids:
            offsets.append(self._next)
            if self._detokenizer is not None:
                self._next += len(self._detokenizer.push((token,)))
        return offsets
