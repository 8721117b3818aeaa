"""`/v1/completions`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from deployments.ingress.answers import (
    Chunks,
    EventStream,
    header,
    new_id,
    open_stream,
    usage,
)
from deployments.ingress.echo import Echo
from deployments.ingress.served import Piece, ServedModel, ServedModels, build_jobs
from deployments.ingress.text_offsets import TextOffsets
from deployments.ingress.token_ids import TokenIdChunks
from deployments.ingress.whole_answers import answer_size, whole_answer
from deployments.protocols.body import read_body
from deployments.protocols.logprobs import completion_logprobs, joined_logprobs, prompt_logprobs
from deployments.protocols.openai import CompletionBody
from deployments.protocols.sampling import check_room
from engine.job import Job
from engine.outputs import Logprob


async def handle_completion(
    models: ServedModels, request: Request, data: bytes
) -> Response | EventStream:
    """Answer a text completion, streamed or whole."""
    body = await read_body(CompletionBody, data)
    model = models.find(body.model)
    params = body.to_params()
    body.check_stream_options()
    echo = Echo(model, body)
    answer_id = new_id("cmpl")
    prompts = body.prompts()
    with model.admission(len(prompts), params, "prompt"):
        jobs = await build_jobs(
            model,
            answer_id,
            prompts,
            params,
            priority=body.priority,
            cache_salt=body.cache_salt,
            add_special_tokens=body.add_special_tokens,
            keep_last=body.num_kept(model.max_model_len, params),
        )
        lengths = (len(job.prompt_token_ids) for job in jobs)
        check_room(lengths, model.max_model_len, body.output_limit())
    begin = header(answer_id, "text_completion", body.model)
    if body.stream:
        return await _stream(model, body, jobs, echo, begin)
    await model.finish(jobs)
    return await _whole(model, body, jobs, echo, begin)


async def _whole(
    model: ServedModel,
    body: CompletionBody,
    jobs: Sequence[Job],
    echo: Echo,
    begin: dict[str, Any],
) -> Response:
    """An answer that has ended."""

    def build() -> dict[str, Any]:
        return {**begin, "choices": _choices(model, body, jobs, echo), "usage": usage(jobs)}

    size = answer_size(jobs, bool(body.return_token_ids or body.echo))
    return await whole_answer(size, build, ("choices", "logprobs"))


async def _stream(
    model: ServedModel,
    body: CompletionBody,
    jobs: Sequence[Job],
    echo: Echo,
    begin: dict[str, Any],
) -> EventStream:
    batches = echo.scored(model.run(jobs))
    telling = TokenIdChunks(body, jobs, begin, in_choice=True) if body.return_token_ids else None
    chunks = telling or Chunks(body, jobs, begin)
    write = chunks.noting(_Writer(model, body, chunks, echo).write)
    return await open_stream(batches, write, chunks.last)


def _logprobs(
    body: CompletionBody, entries: list[dict[int, Logprob]], offsets: TextOffsets
) -> dict[str, Any]:
    """OpenAI's `logprobs` of the next tokens of an output."""
    by_id = bool(body.return_tokens_as_token_ids)
    places = offsets.read(next(iter(entry)) for entry in entries)
    return completion_logprobs(entries, body.logprobs or 0, places, by_id)


def _choices(
    model: ServedModel, body: CompletionBody, jobs: Sequence[Job], echo: Echo
) -> list[dict[str, Any]]:
    choices: list[dict[str, Any]] = []
    for job in jobs:
        result, echoed, scores = job.output(), echo.text(job), echo.logprobs(job)
        for output in result.outputs:
            logprobs = None
            if output.logprobs is not None:
                offsets = TextOffsets.of_output(model.tokenizer, job, len(echoed))
                logprobs = _logprobs(body, output.logprobs, offsets)
            choice: dict[str, Any] = {
                "index": len(choices),
                "text": echoed + output.text,
                "logprobs": joined_logprobs(scores, logprobs),
                "finish_reason": output.finish_reason,
                "stop_reason": output.stop_reason,
            }
            if body.return_token_ids:
                choice["prompt_token_ids"] = job.prompt_token_ids
                choice["token_ids"] = output.token_ids
            if body.prompt_logprobs is not None:
                entries = prompt_logprobs(result.prompt_logprobs, body.prompt_logprobs)
                choice["prompt_logprobs"] = entries
            choices.append(choice)
    return choices


class _Writer:
    """Writes the chunks of one answer."""

    def __init__(
        self, model: ServedModel, body: CompletionBody, chunks: Chunks, echo: Echo
    ) -> None:
        self._model = model
        self._chunks = chunks
        self._body = body
        self._echo = echo
        self._begun: set[int] = set()
        self._offsets: dict[int, TextOffsets] = {}
        """Of choices with log-probabilities."""

    def write(self, piece: Piece) -> bytes:
        """The chunk of a piece, unless there is nothing in it."""
        delta, index, job = piece.delta, piece.choice, piece.job
        text, logprobs = delta.text, None
        if delta.logprobs:
            logprobs = _logprobs(self._body, delta.logprobs, self._offsets_of(piece))
        if index not in self._begun:
            self._begun.add(index)
            text = self._echo.text(job) + text
            logprobs = joined_logprobs(self._echo.logprobs(job), logprobs)
        if not text and delta.finish_reason is None and not logprobs:
            return b""
        return self._chunks.chunk(
            {
                "index": index,
                "text": text,
                "logprobs": logprobs,
                "finish_reason": delta.finish_reason,
                "stop_reason": delta.stop_reason,
            }
        )

    def _offsets_of(self, piece: Piece) -> TextOffsets:
        """What has read the tokens of a piece's choice so far."""
        if (offsets := self._offsets.get(piece.choice)) is None:
            start = len(self._echo.text(piece.job))
            offsets = TextOffsets.of_output(self._model.tokenizer, piece.job, start)
            self._offsets[piece.choice] = offsets
        return offsets
