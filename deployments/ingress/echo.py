"""Prompts that come again at the beginning of their completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

from deployments.ingress.served import Piece, ServedModel, aside
from deployments.ingress.text_offsets import TextOffsets
from deployments.protocols.logprobs import completion_logprobs, joined_logprobs, token_name
from deployments.protocols.openai import CompletionBody
from engine.detokenizer import IncrementalDetokenizer
from engine.job import Job
from engine.outputs import Logprob
from engine.tokenizer import Tokenizer


class Echo:
    """What the choices of an answer begin with, if the request says `echo`.

    Raises:
        InvalidRequest: when built, if it does, and the model has no tokenizer.
    """

    def __init__(self, model: ServedModel, body: CompletionBody) -> None:
        self._tokenizer = model.need_tokenizer("echo") if body.echo else None
        self._body = body
        self._scores: dict[str, dict[str, Any]] = {}
        """Log-probabilities of prompts, by job, which all completions of one share."""

    def text(self, job: Job) -> str:
        """The text of a prompt; that of one which came as token ids, special ones included."""
        if self._tokenizer is None:
            return ""
        if job.prompt is None:
            job.prompt = self._tokenizer.decode(job.prompt_token_ids, skip_special_tokens=False)
        return job.prompt

    def scored(
        self, batches: AsyncGenerator[list[Piece], None]
    ) -> AsyncGenerator[list[Piece], None]:
        """The pieces of a stream, those of a prompt that is to be scored only once it is.

        Only the first completion asks for that, and others may be ahead of it. To put scores in
        their form takes seconds for long prompts, and is done where nobody has to wait for it.
        """
        wanted = self._tokenizer is not None and self._body.logprobs is not None
        return self._once_scored(batches) if wanted else batches

    async def _once_scored(
        self, batches: AsyncGenerator[list[Piece], None]
    ) -> AsyncGenerator[list[Piece], None]:
        early: dict[str, list[Piece]] = {}
        async with aclosing(batches):
            async for pieces in batches:
                due: list[Piece] = []
                for piece in pieces:
                    job = piece.job
                    early.setdefault(job.request_id, []).append(piece)
                    num_entries = next(iter(job.processors.values())).num_prompt_logprobs
                    if num_entries == len(job.prompt_token_ids):
                        num_scores = num_entries * (1 + (self._body.logprobs or 0))
                        await aside(num_scores, partial(self.logprobs, job))
                        due += early.pop(job.request_id)
                yield due

    def logprobs(self, job: Job) -> dict[str, Any] | None:
        """Log-probabilities of a prompt in the form of text completions, None for its first token.

        They are None as a whole if they are not wanted.
        """
        if self._tokenizer is None or self._body.logprobs is None:
            return None
        if job.request_id not in self._scores:
            self._scores[job.request_id] = self._read(job, self._tokenizer, self._body.logprobs)
        return self._scores[job.request_id]

    def _read(self, job: Job, tokenizer: Tokenizer, num_top: int) -> dict[str, Any]:
        ids, by_id = job.prompt_token_ids, bool(self._body.return_tokens_as_token_ids)
        offsets = _offsets(tokenizer, ids, self.text(job))
        first = {
            "tokens": [token_name(ids[0], tokenizer.token_text(ids[0]), by_id)],
            "token_logprobs": [None],
            "top_logprobs": [None] if num_top else None,
            "text_offset": offsets[:1],
        }
        entries = [entry for entry in _entries(job) if entry is not None]
        scored = completion_logprobs(entries, num_top, offsets[1:], by_id)
        return joined_logprobs(first, scored) or {}


def _entries(job: Job) -> list[dict[int, Logprob] | None]:
    """Log-probabilities of the prompt so far, which only the first completion asks for."""
    return next(iter(job.processors.values())).prompt_logprobs or []


def _offsets(tokenizer: Tokenizer, token_ids: list[int], text: str) -> list[int]:
    """Where each token begins in the text of a prompt.

    Tokens that the tokenizer put around the text take no room.
    """
    before = max(0, tokenizer.decode(token_ids, skip_special_tokens=False).find(text))
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    starts = TextOffsets(detokenizer, -before).read(token_ids)
    return [min(max(0, start), len(text)) for start in starts]
