"""`/v1/responses`: an answer as a list of items, and the events that tell of them.

Nothing is kept: whoever goes on with an answer sends its items again.
"""

from __future__ import annotations

import time
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from deployments.ingress.answers import EventStream, to_json, usage
from deployments.ingress.errors import to_api_error
from deployments.ingress.message_style import MessageForm
from deployments.ingress.prompts import chat_prompt
from deployments.ingress.response_items import Output, new_id
from deployments.ingress.served import Piece, ServedModel, ServedModels, build_jobs
from deployments.ingress.whole_answers import answer_size, whole_answer
from deployments.protocols.body import read_body
from deployments.protocols.logprobs import chat_logprobs
from deployments.protocols.reasoning import thinking_in_prompt
from deployments.protocols.responses import ResponsesBody, renamed
from deployments.protocols.sampling import check_room
from engine.errors import InvalidRequest
from engine.job import Job
from engine.outputs import Logprob

_PLAIN = MessageForm(None, None, None, None)
"""Reads all text as content."""
_FUNCTION = {"description": None, "parameters": None, "strict": None}
"""What answers say of a function whose request does not."""


async def handle_responses(
    models: ServedModels, request: Request, data: bytes
) -> Response | EventStream:
    """Answer an input, streamed or whole."""
    body = await read_body(ResponsesBody, data)
    model = models.find(body.model)
    body.check()
    try:
        return await _respond(model, body, len(data))
    except InvalidRequest as error:
        raise renamed(error) from None


async def _respond(
    model: ServedModel, body: ResponsesBody, body_length: int
) -> Response | EventStream:
    tool_use = body.tool_use()
    params = model.style.params(body.to_params(), tool_use)
    body.check_template_options(model.allow_request_chat_templates)
    answer_id = new_id("resp")
    with model.admission(1, params, "input"):
        remember = body.cache_salt is None
        prompt = await chat_prompt(
            model, body, body.messages(), tool_use, body_length, remember=remember
        )
        (job,) = await build_jobs(
            model,
            answer_id,
            [prompt.token_ids],
            params,
            priority=body.priority,
            cache_salt=body.cache_salt,
            param="input",
        )
        limit = ("max_output_tokens", body.max_output_tokens)
        check_room([len(prompt.token_ids)], model.max_model_len, limit)
        form = model.style.form(
            tool_use, thinking_in_prompt(prompt.text), may_think=params.structured_outputs is None
        )
        output = _output(model, body, form)
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
    size = answer_size([job], with_prompts=False)
    return await whole_answer(size, lambda: _answer(header, job, output), ("output", "content"))


def _output(model: ServedModel, body: ResponsesBody, form: MessageForm | None) -> Output:
    """What takes in the answer.

    Raises:
        InvalidRequest: log-probabilities are asked for where not all tokens are the message's.
    """
    if body.wants_logprobs and form is not None:
        raise InvalidRequest(
            "include: there are no log-probabilities of answers in which calls or thinking are "
            "told from the text; leave them out, or ask /v1/chat/completions.",
            "include",
        )

    def read_logprobs(entries: list[dict[int, Logprob]]) -> list[dict[str, Any]]:
        token_bytes = model.need_tokenizer("include").token_bytes(skip_special_tokens=False)
        return list(chat_logprobs(entries, body.top_logprobs or 0, token_bytes))

    return Output(form or _PLAIN, read_logprobs, bool(body.stream))


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
        "reasoning": {"effort": body.effort(), "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": body.text_format(), "verbosity": "medium"},
        "tool_choice": body.tool_choice or "auto",
        "tools": [_FUNCTION | tool for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
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
