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
from deployments.ingress.errors import json_response
from deployments.ingress.served import Piece, ServedModel, ServedModels, build_jobs
from deployments.ingress.token_ids import TokenIdChunks
from deployments.protocols.body import read_body
from deployments.protocols.logprobs import completion_logprobs, prompt_logprobs
from deployments.protocols.openai import CompletionBody
from engine.job import Job


async def handle_completion(
    models: ServedModels, request: Request, data: bytes
) -> Response | EventStream:
    """Answer a text completion, streamed or whole."""
    body = await read_body(CompletionBody, data)
    model = models.find(body.model)
    params = body.to_params()
    body.check_stream_options()
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
        if body.echo:
            _write_prompts(model, jobs)
    begin = header(answer_id, "text_completion", body.model)
    if body.stream:
        return await _stream(model, body, jobs, begin)
    await model.finish(jobs)
    return json_response({**begin, "choices": _choices(body, jobs), "usage": usage(jobs)})


async def _stream(
    model: ServedModel, body: CompletionBody, jobs: Sequence[Job], begin: dict[str, Any]
) -> EventStream:
    if body.return_token_ids:
        chunks = TokenIdChunks(body, jobs, begin, in_choice=True)
        write = chunks.noting(_Writer(body, chunks).write)
        return await open_stream(model, jobs, write, chunks.last)
    plain = Chunks(body, jobs, begin)
    return await open_stream(model, jobs, _Writer(body, plain).write, plain.last)


def _write_prompts(model: ServedModel, jobs: Sequence[Job]) -> None:
    """Give prompts that came as token ids their text."""
    for job in jobs:
        if job.prompt is None:
            tokenizer = model.need_tokenizer("echo")
            job.prompt = tokenizer.decode(job.prompt_token_ids, skip_special_tokens=False)


def _echoed(body: CompletionBody, job: Job) -> str:
    return (job.prompt or "") if body.echo else ""


def _choices(body: CompletionBody, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    choices: list[dict[str, Any]] = []
    for job in jobs:
        result = job.output()
        for output in result.outputs:
            choice: dict[str, Any] = {
                "index": len(choices),
                "text": _echoed(body, job) + output.text,
                "logprobs": None,
                "finish_reason": output.finish_reason,
                "stop_reason": output.stop_reason,
            }
            if output.logprobs is not None:
                choice["logprobs"] = completion_logprobs(output.logprobs, body.logprobs or 0, 0)
            if body.return_token_ids:
                choice["prompt_token_ids"] = job.prompt_token_ids
                choice["token_ids"] = output.token_ids
            if result.prompt_logprobs is not None:
                choice["prompt_logprobs"] = prompt_logprobs(result.prompt_logprobs)
            choices.append(choice)
    return choices


class _Writer:
    """Writes the chunks of one answer."""

    def __init__(self, body: CompletionBody, chunks: Chunks) -> None:
        self._chunks = chunks
        self._body = body
        self._written: dict[int, int] = {}
        """Characters written so far, by choice."""

    def write(self, piece: Piece) -> bytes:
        """The chunk of a piece, unless there is nothing in it."""
        delta, index = piece.delta, piece.choice
        text = delta.text
        if index not in self._written:
            text = _echoed(self._body, piece.job) + text
        so_far = self._written.get(index, 0)
        self._written[index] = so_far + len(text)
        if not text and delta.finish_reason is None and not delta.logprobs:
            return b""
        logprobs = delta.logprobs and completion_logprobs(
            delta.logprobs, self._body.logprobs or 0, so_far
        )
        return self._chunks.chunk(
            {
                "index": index,
                "text": text,
                "logprobs": logprobs or None,
                "finish_reason": delta.finish_reason,
                "stop_reason": delta.stop_reason,
            }
        )
