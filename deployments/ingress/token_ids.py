"""Token ids in answers, for `return_token_ids`: fields and places are vLLM's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from deployments.ingress.answers import Chunks
from deployments.ingress.served import Piece
from deployments.protocols.openai import GenerationBody
from engine.job import Job


class TokenIdChunks(Chunks):
    """Chunks that tell which tokens have come since the last one of their choice.

    Args:
        body: the request.
        jobs: that it runs.
        begin: the fields that every chunk begins with.
        in_choice: whether the ids of the prompt go into the first chunk of each choice, as in
            completions, or beside the choice, as in chats.
    """

    def __init__(
        self, body: GenerationBody, jobs: Sequence[Job], begin: dict[str, Any], in_choice: bool
    ) -> None:
        super().__init__(body, jobs, begin)
        self._in_choice = in_choice
        self._new: dict[int, list[int]] = {}
        self._prompts: dict[int, list[int]] = {}
        """By choice, until they are told."""

    def noting(self, write: Callable[[Piece], bytes]) -> Callable[[Piece], bytes]:
        """As for all chunks; the tokens are told as well."""
        write = super().noting(write)

        def note_and_write(piece: Piece) -> bytes:
            index = piece.choice
            if index not in self._new:
                self._new[index] = []
                self._prompts[index] = piece.job.prompt_token_ids
            self._new[index] += piece.delta.token_ids
            return write(piece)

        return note_and_write

    def chunk(self, choice: dict[str, Any]) -> bytes:
        """One chunk with one choice."""
        index = choice["index"]
        choice["token_ids"], self._new[index] = self._new[index], []
        prompt = self._prompts.pop(index, None)
        told = {} if prompt is None else {"prompt_token_ids": prompt}
        if self._in_choice:
            return super().chunk({**choice, **told})
        return self.chunk_with(choice, told)
