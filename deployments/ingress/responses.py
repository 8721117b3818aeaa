"""`/v1/responses`: an answer as a list of items, and the events that tell of them.

Nothing is kept: whoever goes on with an answer sends its items again.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from deployments.ingress.answers import EventStream, to_json, usage
from deployments.ingress.errors import json_response, to_api_error
from deployments.ingress.message_style import MessageForm, MessageParser
from deployments.ingress.prompts import render_chat, tokenize
from deployments.ingress.served import Piece, ServedModel, ServedModels, build_jobs
from deployments.protocols.body import read_body
from deployments.protocols.message_events import Event, Reasoning, Text
from deployments.protocols.reasoning import thinking_in_prompt
from deployments.protocols.responses import ResponsesBody
from engine.errors import InvalidRequest
from engine.job import Job
from engine.outputs import FinishReason

_PLAIN = MessageForm(None, None, None, None)
"""Reads all text as content."""


async def handle_responses(
    models: ServedModels, request: Request, data: bytes
) -> Response | EventStream:
    """Answer an input, streamed or whole."""
    body = await read_body(ResponsesBody, data)
    model = models.find(body.model)
    body.check()
    params = model.style.params(body.to_params(), None)
    body.check_template_options(model.allow_request_chat_templates)
    answer_id = _new_id("resp")
    with model.admission(1, params, "input"):
        text = await _render(model, body, len(data))
        (job,) = await build_jobs(
            model,
            answer_id,
            [await tokenize(model, text, "input")],
            params,
            priority=body.priority,
            cache_salt=body.cache_salt,
            param="input",
        )
    may_think = params.structured_outputs is None
    form = model.style.form(None, thinking_in_prompt(text), may_think=may_think) or _PLAIN
    output = Output(form.parser())
    header = _header(answer_id, body)
    if body.stream:
        writer = _Writer(header, job, output)
        batches = model.run([job])
        first = await anext(batches)
        return EventStream(first, batches, writer.write, writer.last, writer.failed, b"")
    async with aclosing(model.run([job])) as batches:
        async for pieces in batches:
            for piece in pieces:
                for _ in output.push(piece):
                    pass
    return json_response(_answer(header, job, output))


async def _render(model: ServedModel, body: ResponsesBody, body_length: int) -> str:
    """The prompt; errors name the field that the messages came in."""
    try:
        return await render_chat(model, body, body.messages(), None, body_length)
    except InvalidRequest as error:
        param = "input" if error.param == "messages" else error.param
        raise InvalidRequest(error.message, param) from None


class Output:
    """The items of an answer as it grows: thinking, if any, and then a message.

    Args:
        parser: tells which text is which.
    """

    def __init__(self, parser: MessageParser) -> None:
        self.items: list[dict[str, Any]] = []
        self.finish_reason: FinishReason | None = None
        self.num_reasoning_tokens = 0
        """Of the output's tokens, to within those that came with the thinking's last one."""
        self._parser = parser
        self._kind: type[Event] | None = None
        """Of what the last item holds."""

    @property
    def status(self) -> str:
        """Of the answer and its last item, as OpenAI calls it."""
        if self.finish_reason is None:
            return "in_progress"
        return "incomplete" if self.finish_reason == "length" else "completed"

    def push(self, piece: Piece) -> Iterator[tuple[str, dict[str, Any]]]:
        """Take in a piece, and tell the types and fields of the events that it makes."""
        reason = piece.delta.finish_reason
        for event in self._parser.push(piece.delta.text, reason is not None):
            if type(event) is not self._kind:
                yield from self._end_item("completed")
                yield from self._begin_item(type(event))
            if isinstance(event, Reasoning):
                self.num_reasoning_tokens = _num_tokens(piece.job)
            if isinstance(event, Text | Reasoning) and event.text:
                self._part["text"] += event.text
                yield self._event("delta", delta=event.text)
        if reason is not None:
            self.finish_reason = reason
            if not self.items:
                yield from self._begin_item(Text)
            yield from self._end_item(self.status)

    @property
    def _part(self) -> dict[str, Any]:
        part: dict[str, Any] = self.items[-1]["content"][0]
        return part

    def _begin_item(self, kind: type[Event]) -> Iterator[tuple[str, dict[str, Any]]]:
        self._kind = kind
        item: dict[str, Any]
        part: dict[str, Any]
        if kind is Reasoning:
            part = {"type": "reasoning_text", "text": ""}
            item = {"type": "reasoning", "id": _new_id("rs"), "summary": []}
        else:
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item = {"type": "message", "id": _new_id("msg"), "role": "assistant"}
        item |= {"status": "in_progress", "content": []}
        self.items.append(item)
        yield "response.output_item.added", {"output_index": self._index, "item": item}
        item["content"] = [part]
        yield "response.content_part.added", self._place(part=part)

    def _end_item(self, status: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if not self.items:
            return
        item, part = self.items[-1], self._part
        item["status"] = status
        yield self._event("done", text=part["text"])
        yield "response.content_part.done", self._place(part=part)
        yield "response.output_item.done", {"output_index": self._index, "item": item}

    def _event(self, what: str, **fields: str) -> tuple[str, dict[str, Any]]:
        kind = self._part["type"]
        place = self._place(**fields)
        if kind == "output_text":
            place["logprobs"] = []
        return f"response.{kind}.{what}", place

    def _place(self, **fields: Any) -> dict[str, Any]:
        item_id = self.items[-1]["id"]
        return {"item_id": item_id, "output_index": self._index, "content_index": 0, **fields}

    @property
    def _index(self) -> int:
        return len(self.items) - 1


class _Writer:
    """Writes an answer as server-sent events.

    Args:
        header: the fields of the answer that do not change.
        job: that it comes from.
        output: what it holds.
    """

    def __init__(self, header: dict[str, Any], job: Job, output: Output) -> None:
        self._header = header
        self._job = job
        self._output = output
        self._num_written = 0

    def write(self, piece: Piece) -> bytes:
        """The events of a piece, after those that tell that the answer begins."""
        begin = b"" if self._num_written else self._begin()
        return begin + b"".join(self._event(*told) for told in self._output.push(piece))

    def last(self) -> bytes:
        """The event with the whole answer."""
        answer = _answer(self._header, self._job, self._output)
        return self._event(f"response.{answer['status']}", {"response": answer})

    def failed(self, error: Exception) -> bytes:
        """The event with what there is of an answer that has failed."""
        code = (
            "rate_limit_exceeded"
            if (found := to_api_error(error)).status == 429
            else "server_error"
        )
        answer = _answer(self._header, self._job, self._output)
        answer |= {"status": "failed", "error": {"code": code, "message": found.message}}
        return self._event("response.failed", {"response": answer})

    def _begin(self) -> bytes:
        answer = {"response": self._header}
        return self._event("response.created", answer) + self._event("response.in_progress", answer)

    def _event(self, kind: str, fields: dict[str, Any]) -> bytes:
        value = {"type": kind, "sequence_number": self._num_written, **fields}
        self._num_written += 1
        return b"event: " + kind.encode() + b"\ndata: " + to_json(value) + b"\n\n"


def _new_id(prefix: str) -> str:
    """OpenAI's ids of answers and their items have underscores; some clients look at the prefix."""
    return f"{prefix}_{uuid.uuid4().hex}"


def _header(answer_id: str, body: ResponsesBody) -> dict[str, Any]:
    """An answer that has only begun: it repeats what was asked for."""
    return {
        "id": answer_id,
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "model": body.model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": body.text_format(), "verbosity": "medium"},
        "tool_choice": body.tool_choice or "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


def _answer(header: dict[str, Any], job: Job, output: Output) -> dict[str, Any]:
    """The answer so far."""
    status = output.status
    cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
    return {
        **header,
        "status": status,
        "completed_at": int(time.time()) if status == "completed" else None,
        "incomplete_details": cut,
        "output": output.items,
        "usage": _usage(job, output),
    }


def _usage(job: Job, output: Output) -> dict[str, Any]:
    so_far = usage([job])
    cached = so_far["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": so_far["prompt_tokens"],
        # OpenAI charges for some writes to its cache; here there is nothing to tell of them.
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": so_far["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": output.num_reasoning_tokens},
        "total_tokens": so_far["total_tokens"],
    }


def _num_tokens(job: Job) -> int:
    return sum(len(processor.token_ids) for processor in job.processors.values())
