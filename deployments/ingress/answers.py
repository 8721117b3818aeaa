"""The answers that completions and chat have in common: usage, ids, and server-sent events."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.datastructures import MutableHeaders
from starlette.types import Receive, Scope, Send

from deployments.ingress.errors import to_api_error
from deployments.ingress.served import Piece
from deployments.protocols.openai import GenerationBody
from engine.job import Job

logger = logging.getLogger("ray.serve")

DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

to_json = msgspec.json.Encoder().encode
"""Any plain value to JSON."""


def new_id(prefix: str) -> str:
    """An id for an answer, which also names its requests to the engines."""
    return f"{prefix}-{uuid.uuid4().hex}"


def header(answer_id: str, kind: str, model: str) -> dict[str, Any]:
    """The fields that every answer and chunk begins with."""
    return {"id": answer_id, "object": kind, "created": int(time.time()), "model": model}


def usage(jobs: Sequence[Job]) -> dict[str, Any]:
    """OpenAI's `usage` of what has been generated so far."""
    prompt = sum(len(job.prompt_token_ids) for job in jobs)
    processors = [p for job in jobs for p in job.processors.values()]
    completion = sum(len(processor.token_ids) for processor in processors)
    cached = sum(map(_num_cached, jobs))
    return _usage(prompt, completion, cached)


def _num_cached(job: Job) -> int:
    return next(iter(job.processors.values())).num_cached_tokens


def _usage(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class RunningUsage:
    """`usage` of the pieces of a stream so far.

    It is kept up piece by piece: to add up all jobs for each chunk would take the square of their
    number.

    Args:
        jobs: that the pieces come from.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._prompt = sum(len(job.prompt_token_ids) for job in jobs)
        self._completion = 0
        self._cached: dict[str, int] = {}
        """By job."""
        self._all_cached = 0

    def add(self, piece: Piece) -> None:
        """Count the next piece."""
        job = piece.job
        self._completion += len(piece.delta.token_ids)
        cached = _num_cached(job)
        self._all_cached += cached - self._cached.get(job.request_id, 0)
        self._cached[job.request_id] = cached

    def value(self) -> dict[str, Any]:
        """OpenAI's form."""
        return _usage(self._prompt, self._completion, self._all_cached)


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


def error_event(error: Exception) -> bytes:
    """The event that tells of an error after a stream has begun."""
    return event(to_api_error(error).body())


class EventStream:
    """A `text/event-stream` answer: a response, as ASGI has it.

    Args:
        first: what had come before the status was sent.
        batches: gives what comes after it.
        write: the events that tell of a piece.
        last: the events that come after all pieces.
        failed: the event that tells of an error; by default the error object.
        done: what ends every stream.

    Attributes:
        headers: of the response.
    """

    def __init__(
        self,
        first: list[Piece],
        batches: AsyncGenerator[list[Piece], None],
        write: Callable[[Piece], bytes],
        last: Callable[[], bytes],
        failed: Callable[[Exception], bytes] = error_event,
        done: bytes = DONE,
    ) -> None:
        self._first = first
        self._batches = batches
        self._write = write
        self._last = last
        self._failed = failed
        self._done = done
        self.headers = MutableHeaders(raw=list(_HEADERS))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send to the end; what has piled up since the last write leaves in one write."""
        async with aclosing(self._batches):
            await send({"type": "http.response.start", "status": 200, "headers": self.headers.raw})
            try:
                await self._send_pieces(send)
                end = self._last()
            except Exception as error:
                end = self._failed(error)
        await send({"type": "http.response.body", "body": end + self._done})

    async def _send_pieces(self, send: Send) -> None:
        write = self._write
        if data := b"".join(map(write, self._first)):
            await send({"type": "http.response.body", "body": data, "more_body": True})
        async for pieces in self._batches:
            if data := b"".join(map(write, pieces)):
                await send({"type": "http.response.body", "body": data, "more_body": True})


async def open_stream(
    batches: AsyncGenerator[list[Piece], None],
    write: Callable[[Piece], bytes],
    last: Callable[[], bytes],
) -> EventStream:
    """Start what runs, and stream it.

    Returns when the first tokens are there, so that what fails before has a proper HTTP status.

    Args:
        batches: of what comes, such as `ServedModel.run` gives.
        write: the events that tell of a piece.
        last: the events that come after all pieces.
    """
    return EventStream(await anext(batches), batches, write, last)


class Chunks:
    """Writes the chunks of a streamed answer.

    Args:
        body: the request.
        jobs: that it runs.
        begin: the fields that every chunk begins with.
    """

    def __init__(self, body: GenerationBody, jobs: Sequence[Job], begin: dict[str, Any]) -> None:
        options = body.stream_options
        self._jobs = jobs
        self._begin = begin
        self._usage = bool(options and options.include_usage)
        continuous = bool(options and options.continuous_usage_stats)
        self._running = RunningUsage(jobs) if continuous else None
        # All chunks but their choices are alike, so that they are encoded once.
        self._head = b"data: " + to_json(begin)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if self._usage else b"]}\n\n"

    def noting(self, write: Callable[[Piece], bytes]) -> Callable[[Piece], bytes]:
        """What writes a piece, and has noted before what chunks tell of it beside its choice."""
        if (running := self._running) is None:
            return write

        def count_and_write(piece: Piece) -> bytes:
            running.add(piece)
            return write(piece)

        return count_and_write

    def chunk(self, choice: dict[str, Any]) -> bytes:
        """One chunk with one choice."""
        if self._running is not None:
            return event({**self._begin, "choices": [choice], "usage": self._running.value()})
        return self._head + to_json(choice) + self._tail

    def chunk_with(self, choice: dict[str, Any], more: dict[str, Any]) -> bytes:
        """One chunk with one choice, and more beside the choices."""
        value = {**self._begin, **more, "choices": [choice]}
        if self._usage or self._running is not None:
            value["usage"] = None if self._running is None else self._running.value()
        return event(value)

    def last(self) -> bytes:
        """The chunk with the usage, if it was asked for."""
        if not self._usage:
            return b""
        return event({**self._begin, "choices": [], "usage": usage(self._jobs)})
