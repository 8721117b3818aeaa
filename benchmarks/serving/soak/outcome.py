"""What an answer says, in whatever form it came, and what became of each request."""

from __future__ import annotations

import enum
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.serving.answers import bodies, events
from benchmarks.serving.client import Exchange
from benchmarks.serving.soak.scripts import Script

REFUSALS = (429, 503)
LOST_CODE = b'"engine_lost"'
"""In the body of an error: the request was admitted, and lost."""
_DONE = b"[DONE]"

Window = tuple[float, float]
"""From when until when a frontend was away, in seconds of `time.monotonic()`."""


class Outcome(enum.StrEnum):
    """What became of a request. The last two must not be."""

    COMPLETED = "completed, and right"
    REFUSED = "refused at admission"
    REJECTED = "rejected, and rightly so"
    LEFT = "ended by its client"
    BROKEN = "broken with its ingress or proxy"
    WRONG = "completed, but wrong"
    LOST = "lost"


@dataclass(slots=True)
class Said:
    """The answer's content."""

    texts: dict[int, str] = field(default_factory=dict)
    """By number of the choice."""
    finish_reasons: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    """Of the tokens of each choice."""
    usage: tuple[int, int] | None = None
    """Tokens of the prompt and of the output."""


@dataclass(slots=True)
class Sent:
    """A request that was sent, and what came of it."""

    script: Script
    exchange: Exchange
    left: bool
    """Whether the client left before the end."""
    ended: float
    """Seconds of `time.monotonic()`."""


def read(exchange: Exchange) -> Said:
    """Read an answer, streamed or not.

    Raises:
        ValueError: it is no whole answer.
    """
    if exchange.error is not None:
        raise ValueError(exchange.error)
    said = Said()
    for part in _parts(exchange):
        if "error" in part:
            raise ValueError(f"error: {part['error']}")
        for choice in part["choices"]:
            _add(said, choice)
        if usage := part.get("usage"):
            said.usage = usage["prompt_tokens"], usage["completion_tokens"]
    return said


def judge(sent: Sent, right: dict[Script, Said], windows: Iterable[Window]) -> tuple[Outcome, str]:
    """What became of a request, and where that is not as it should be, why.

    Args:
        sent: the request.
        right: answers of an undisturbed server.
        windows: when frontends were away.
    """
    exchange, script = sent.exchange, sent.script
    if _is_refused(exchange):
        return Outcome.REFUSED, ""
    if exchange.error is None and exchange.status == script.status != 200:
        return Outcome.REJECTED, ""
    try:
        if exchange.error is None and exchange.status != script.status:
            raise ValueError(f"status {exchange.status}")
        said = read(exchange)
    except ValueError as error:
        if sent.left:
            return Outcome.LEFT, ""
        away = any(exchange.sent <= end and sent.ended >= begin for begin, end in windows)
        fault = exchange.error is not None and away
        return (Outcome.BROKEN, "") if fault else (Outcome.LOST, _lost(sent, error))
    if said == right[script]:
        return Outcome.COMPLETED, ""
    return Outcome.WRONG, f"{script.name}: {said} instead of {right[script]}"


def _lost(sent: Sent, error: ValueError) -> str:
    exchange, after_s = sent.exchange, sent.ended - sent.exchange.sent
    told = f"status {exchange.status}, after {after_s:.2f} s, port {exchange.port}"
    return f"{sent.script.name}: {error} ({told})"


def _is_refused(exchange: Exchange) -> bool:
    """Whether nothing was begun, unlike when an engine was lost with the request."""
    if exchange.status not in REFUSALS or not exchange.retry_after or exchange.error is not None:
        return False
    return LOST_CODE not in b"".join(data for _, data in bodies(exchange))


def _parts(exchange: Exchange) -> Iterator[dict[str, Any]]:
    """The JSON objects of the answer."""
    whole = b"".join(data for _, data in bodies(exchange))
    if not whole.startswith(b"data:"):
        yield json.loads(whole)
        return
    payloads = [payload for _, payload in events(bodies(exchange))]
    if payloads[-1] != _DONE:
        raise ValueError("the stream ended before [DONE]")
    yield from map(json.loads, payloads[:-1])


def _add(said: Said, choice: dict[str, Any]) -> None:
    index = choice["index"]
    message = choice.get("message") or choice.get("delta") or {}
    text = choice.get("text") or message.get("content") or ""
    said.texts[index] = said.texts.get(index, "") + text
    if reason := choice.get("finish_reason"):
        said.finish_reasons[index] = reason
    if logprobs := choice.get("logprobs"):
        entries = logprobs.get("content") or []
        values = logprobs.get("token_logprobs") or [entry["logprob"] for entry in entries]
        said.logprobs.setdefault(index, []).extend(values)
