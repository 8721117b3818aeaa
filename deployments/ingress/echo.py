"""Prompts that come again at the beginning of their completions."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from deployments.ingress.served import ServedModel
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

    def text(self, job: Job) -> str:
        """The text of a prompt; that of one which came as token ids, special ones included."""
        if self._tokenizer is None:
            return ""
        if job.prompt is None:
            job.prompt = self._tokenizer.decode(job.prompt_token_ids, skip_special_tokens=False)
        return job.prompt

    def is_scored(self, job: Job) -> bool:
        """Whether all log-probabilities of a prompt have come, if they are wanted."""
        wanted = self._tokenizer is not None and self._body.logprobs is not None
        return not wanted or len(_entries(job)) == len(job.prompt_token_ids)

    def logprobs(self, job: Job) -> dict[str, Any] | None:
        """Log-probabilities of a prompt in the form of text completions, None for its first token.

        They are None as a whole if they are not wanted.
        """
        tokenizer, num_top = self._tokenizer, self._body.logprobs
        if tokenizer is None or num_top is None:
            return None
        ids, by_id = job.prompt_token_ids, bool(self._body.return_tokens_as_token_ids)
        first = {
            "tokens": [token_name(ids[0], tokenizer.token_text(ids[0]), by_id)],
            "token_logprobs": [None],
            "top_logprobs": [None] if num_top else None,
        }
        entries = [entry for entry in _entries(job) if entry is not None]
        scored = joined_logprobs(first, completion_logprobs(entries, num_top, 0, by_id))
        return {**(scored or {}), "text_offset": _offsets(tokenizer, ids, self.text(job))}


def _entries(job: Job) -> list[dict[int, Logprob] | None]:
    """Log-probabilities of the prompt so far, which only the first completion asks for."""
    return next(iter(job.processors.values())).prompt_logprobs or []


def _offsets(tokenizer: Tokenizer, token_ids: list[int], text: str) -> list[int]:
    """Where each token begins in the text of a prompt.

    Tokens that the tokenizer put around the text take no room; nor do those that begin a character
    which the next ones complete.
    """
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    pieces = [detokenizer.push((token,)) for token in token_ids]
    before = max(0, "".join(pieces).find(text))
    starts = accumulate(map(len, pieces[:-1]), initial=-before)
    return [min(max(0, start), len(text)) for start in starts]
