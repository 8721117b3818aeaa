"""`/v1/chat/completions`."""

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
from deployments.ingress.served import Piece, ServedModel, ServedModels, aside, build_jobs
from deployments.protocols.body import read_body
from deployments.protocols.logprobs import chat_logprobs, prompt_logprobs
from deployments.protocols.openai import ChatBody
from engine.job import Job
from engine.outputs import Logprob


async def handle_chat(
    models: ServedModels, request: Request, data: bytes
) -> Response | EventStream:
    """Answer a chat, streamed or whole."""
    body = await read_body(ChatBody, data)
    model = models.find(body.model)
    params = body.to_params()
    body.check_stream_options()
    body.check_template_options(model.allow_request_chat_templates)
    answer_id = new_id("chatcmpl")
    with model.admission(1, params, "messages"):
        prompt = await _prompt(model, body, len(data))
        jobs = await build_jobs(
            model,
            answer_id,
            [prompt],
            params,
            priority=body.priority,
            cache_salt=body.cache_salt,
            param="messages",
        )
    if body.stream:
        begin = header(answer_id, "chat.completion.chunk", body.model)
        writer = _Writer(model, body, jobs, begin)
        return await open_stream(model, jobs, writer.write, writer.chunks.last)
    await model.finish(jobs)
    begin = header(answer_id, "chat.completion", body.model)
    answer = {**begin, "choices": _choices(model, body, jobs[0]), "usage": usage(jobs)}
    if params.prompt_logprobs is not None:
        answer["prompt_logprobs"] = prompt_logprobs(jobs[0].output().prompt_logprobs)
    return json_response(answer)


async def _prompt(model: ServedModel, body: ChatBody, body_length: int) -> list[int]:
    tokenizer = model.need_tokenizer("messages")
    options: dict[str, Any] = dict(body.chat_template_kwargs or {})
    if body.add_generation_prompt is not None or body.continue_final_message:
        options["add_generation_prompt"] = bool(body.add_generation_prompt)

    def render() -> str:
        return tokenizer.apply_chat_template(
            body.messages,
            chat_template=body.chat_template,
            continue_final_message=body.continue_final_message,
            **options,
        )

    text = await aside(body_length, render)
    model.check_length(text, "messages")  # a template may write more than it was given
    return await aside(len(text), lambda: tokenizer.encode(text, add_special_tokens=False))


def _logprobs(
    model: ServedModel, body: ChatBody, entries: list[dict[int, Logprob]] | None
) -> dict[str, Any] | None:
    if entries is None:
        return None
    token_bytes = model.need_tokenizer("logprobs").token_bytes(skip_special_tokens=False)
    return chat_logprobs(entries, body.top_logprobs or 0, token_bytes)


def _choices(model: ServedModel, body: ChatBody, job: Job) -> list[dict[str, Any]]:
    choices = []
    for output in job.output().outputs:
        choices.append(
            {
                "index": output.index,
                "message": {"role": "assistant", "content": output.text},
                "logprobs": _logprobs(model, body, output.logprobs),
                "finish_reason": output.finish_reason,
                "stop_reason": output.stop_reason,
            }
        )
    return choices


class _Writer:
    """Writes the chunks of one answer."""

    def __init__(
        self, model: ServedModel, body: ChatBody, jobs: Sequence[Job], begin: dict[str, Any]
    ) -> None:
        self.chunks = Chunks(body, jobs, begin)
        self._model = model
        self._body = body
        self._begun: set[int] = set()

    def write(self, piece: Piece) -> bytes:
        """The chunk of a piece, after one with the role if it is the first of its choice."""
        delta, index = piece.delta, piece.choice
        role = b""
        if index not in self._begun:
            self._begun.add(index)
            role = self._chunk(index, {"role": "assistant", "content": ""})
        if not delta.text and delta.finish_reason is None and not delta.logprobs:
            return role
        logprobs = _logprobs(self._model, self._body, delta.logprobs or None)
        message = {"content": delta.text} if delta.text else {}
        chunk = self._chunk(index, message, logprobs, delta.finish_reason, delta.stop_reason)
        return role + chunk

    def _chunk(
        self,
        index: int,
        message: dict[str, str],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
        stop_reason: int | str | None = None,
    ) -> bytes:
        choice: dict[str, Any] = {
            "index": index,
            "delta": message,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        if stop_reason is not None:
            choice["stop_reason"] = stop_reason
        return self.chunks.chunk(choice)
