"""Reads the answers that the client noted: events, their text, when they came, and errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import msgspec

from benchmarks.serving.client import Exchange

_DONE = b"[DONE]"


class _Choice(msgspec.Struct):
    text: str = ""
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    id: str = ""
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: dict[str, object] | None = None


_decode = msgspec.json.Decoder(_Event).decode


@dataclass(slots=True)
class Answer:
    """A streamed completion as the client saw it; times are seconds of `time.monotonic()`."""

    prompt: str
    asked_tokens: int
    """Tokens of output that the request asked for."""
    sent: float
    """When the request was due."""
    request_id: str = ""
    events: list[tuple[float, str]] = field(default_factory=list)
    """When text came, and which."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None
    """What went wrong: an HTTP status, the server's message, or a broken connection."""

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(text for _, text in self.events)


@dataclass(slots=True)
class Run:
    """What came of one load."""

    answers: list[Answer]
    begin: float
    """When the first request was due, in seconds of `time.monotonic()`, as are the times below."""
    end: float
    full: tuple[float, float] | None = None
    """From when until when every client of a closed loop had work; None where it is not known."""
    itl: list[float] | None = None
    """Gaps between events in seconds, where they are known only so and not by the answers."""


def read_answer(prompt: str, asked_tokens: int, exchange: Exchange) -> Answer:
    """Read a finished exchange; whatever is wrong with it is its `error`."""
    answer = Answer(prompt, asked_tokens, exchange.sent, error=exchange.error)
    if answer.error is None:
        try:
            _read_into(answer, exchange)
        except (ValueError, msgspec.MsgspecError) as error:
            answer.error = f"not an event stream: {error}"
    return answer


def _read_into(answer: Answer, exchange: Exchange) -> None:
    if exchange.status != 200:
        body = b"".join(data for _, data in bodies(exchange))
        answer.error = f"HTTP {exchange.status}: {body[:200].decode(errors='replace')}"
        return
    ended = False
    for when, payload in events(bodies(exchange)):
        if payload == _DONE:
            ended = True
            continue
        event = _decode(payload)
        answer.request_id = answer.request_id or event.id
        if event.error is not None:
            answer.error = str(event.error.get("message"))
        if event.usage is not None:
            answer.prompt_tokens = event.usage.prompt_tokens
            answer.output_tokens = event.usage.completion_tokens
        if text := "".join(choice.text for choice in event.choices):
            answer.events.append((when, text))
    if not ended:
        answer.error = answer.error or "the stream ended before [DONE]"


def bodies(exchange: Exchange) -> Iterator[tuple[float, bytes]]:
    """Parts of the body, without the framing of chunks, each with the time of its last byte.

    Raises:
        ValueError: a chunk is malformed or cut.
    """
    if not exchange.chunked:
        yield from exchange.pieces
        return
    buffer = b""
    for when, data in exchange.pieces:
        buffer += data
        while (line_end := buffer.find(b"\r\n")) >= 0:
            size = int(buffer[:line_end].partition(b";")[0], 16)
            begin, end = line_end + 2, line_end + 2 + size
            if len(buffer) < end + 2:
                break
            if size:
                yield when, buffer[begin:end]
            buffer = buffer[end + 2 :]
    if buffer:
        raise ValueError(f"the last chunk is cut: {buffer[:50]!r}")


def events(parts: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """Data of each server-sent event, with the time of its last byte; comments are skipped."""
    buffer = b""
    for when, data in parts:
        buffer += data.replace(b"\r\n", b"\n")
        *whole, buffer = buffer.split(b"\n\n")
        for block in whole:
            lines = [line[5:].strip() for line in block.split(b"\n") if line.startswith(b"data:")]
            if lines:
                yield when, b"\n".join(lines)
