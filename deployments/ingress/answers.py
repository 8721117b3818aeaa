"""The answers that completions and chat have in common: usage, ids, and server-sent events."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from typing import Any

import msgspec

from deployments.ingress.errors import to_api_error
from deployments.ingress.exchange import EventStream
from deployments.ingress.served import Piece, ServedModel
from deployments.protocols.openai import GenerationBody
from engine.job import Job

logger = logging.getLogger("ray.serve")

DONE = b"data: [DONE]\n\n"


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
    cached = sum(next(iter(job.processors.values())).num_cached_tokens for job in jobs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


async def open_stream(
    model: ServedModel,
    jobs: Sequence[Job],
    to_events: Callable[[Piece], Iterable[bytes]],
    last_events: Callable[[], Iterable[bytes]],
) -> EventStream:
    """Start jobs and stream them.

    Returns when the first tokens are there, so that what fails before has a proper HTTP status.

    Args:
        model: to run on.
        jobs: what to run.
        to_events: writes the new text of a completion.
        last_events: writes what comes after all completions.
    """
    batches = model.run(jobs)
    first = await anext(batches)
    return EventStream(_events(batches, first, to_events, last_events), batches)


async def _events(
    batches: AsyncGenerator[list[Piece], None],
    first: list[Piece],
    to_events: Callable[[Piece], Iterable[bytes]],
    last_events: Callable[[], Iterable[bytes]],
) -> AsyncGenerator[bytes, None]:
    """What has piled up since the last write leaves in one write."""
    try:
        if data := b"".join(e for piece in first for e in to_events(piece)):
            yield data
        async for pieces in batches:
            if data := b"".join(e for piece in pieces for e in to_events(piece)):
                yield data
    except Exception as error:
        yield event(to_api_error(error).body())
    else:
        yield b"".join(last_events())
    yield DONE


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
        self._continuous = bool(options and options.continuous_usage_stats)

    def chunk(self, choice: dict[str, Any]) -> bytes:
        """One chunk with one choice."""
        value = {**self._begin, "choices": [choice]}
        if self._continuous:
            value["usage"] = usage(self._jobs)
        elif self._usage:
            value["usage"] = None
        return event(value)

    def last(self) -> Iterable[bytes]:
        """The chunk with the usage, if it was asked for."""
        if self._usage:
            yield event({**self._begin, "choices": [], "usage": usage(self._jobs)})
