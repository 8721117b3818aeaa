"""Whole answers: small ones are written at once, large ones where nobody has to wait for it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import msgspec
from starlette.responses import Response

from deployments.ingress.answers import to_json
from deployments.ingress.logprob_budget import num_logprobs
from deployments.ingress.served import aside, is_long
from engine.job import Job

IDS_PER_LOGPROB = 32
"""Token ids, or their texts, that take no longer to write than one log-probability."""
PART = 64
"""Elements of a list that are encoded at once: some tenths of a millisecond at most."""

_encode = msgspec.json.Encoder(enc_hook=list).encode
"""Any plain value, and iterators as lists."""


async def whole_answer(
    size: int, build: Callable[[], dict[str, Any]], opened: Collection[str] = ()
) -> Response:
    """Build an answer and write it: here when it is small, else in a thread, both in one go.

    Args:
        size: roughly, in log-probabilities, or in characters that have to be read for it.
        build: makes the answer's fields; long lists may be iterators.
        opened: see `json_in_parts`.
    """
    large = is_long(size)

    def write() -> Response:
        data = json_in_parts(build(), opened) if large else _encode(build())
        return Response(data, media_type="application/json")

    return await aside(size, write)


def answer_size(jobs: Sequence[Job], with_prompts: bool) -> int:
    """How much an answer with what jobs came to has, in log-probabilities.

    Args:
        jobs: that have ended.
        with_prompts: whether each completion comes with its prompt, as text or token ids.
    """
    tokens = sum(len(p.token_ids) for job in jobs for p in job.processors.values())
    if with_prompts:
        tokens += sum(len(job.prompt_token_ids) * len(job.requests) for job in jobs)
    return tokens // IDS_PER_LOGPROB + sum(map(num_logprobs, jobs))


def json_in_parts(value: dict[str, Any], opened: Collection[str] = ()) -> bytes:
    """JSON of an object, encoded in parts: the encoder lets no other thread run within one.

    Args:
        value: whose fields are written in parts if they are lists. They may be iterators as well:
            then what they give is never there all at once, so that neither the garbage collector
            nor the end of it holds up other threads.
        opened: fields whose objects, or lists of objects, are written field by field in turn.
    """
    return b"".join(_object(value, opened))


def _object(value: dict[str, Any], opened: Collection[str]) -> Iterator[bytes]:
    before = b"{"
    for name, field in value.items():
        yield before + to_json(name) + b":"
        before = b","
        if isinstance(field, list | Iterator):
            yield from _objects(field, opened) if name in opened else _list(field)
        elif isinstance(field, dict) and name in opened:
            yield from _object(field, opened)
        else:
            yield to_json(field)
    yield b"}" if value else b"{}"


def _list(values: Iterable[Any]) -> Iterator[bytes]:
    rest, before = iter(values), b"["
    while part := list(islice(rest, PART)):
        yield before
        yield to_json(part)[1:-1]
        before = b","
    yield b"]" if before == b"," else b"[]"


def _objects(values: Iterable[dict[str, Any]], opened: Collection[str]) -> Iterator[bytes]:
    before = b"["
    for value in values:
        yield before
        yield from _object(value, opened)
        before = b","
    yield b"]" if before == b"," else b"[]"
