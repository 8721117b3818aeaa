"""Puts load on a server: so many clients at a time, or so many arrivals a second."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from benchmarks.serving.answers import Answer, Run, read_answer
from benchmarks.serving.client import Connection, Exchange
from benchmarks.serving.conversations import Conversation

_LEAD_S = 0.2
"""Time to prepare before the first arrival of an open loop."""


@dataclass(frozen=True)
class Target:
    """An OpenAI-compatible server."""

    host: str
    port: int
    model: str
    path: str = "/v1/completions"
    api_key: str | None = None
    timeout_s: float = 600.0
    """For one answer."""
    temperature: float = 0.0

    def request(self, prompt: str, output_tokens: int) -> bytes:
        """A streamed completion of exactly `output_tokens` tokens, as HTTP."""
        body = json.dumps(
            {
                "model": self.model,
                "prompt": prompt,
                "max_tokens": output_tokens,
                "temperature": self.temperature,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        key = f"Authorization: Bearer {self.api_key}\r\n" if self.api_key else ""
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n{key}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


@dataclass(slots=True)
class Sent:
    """One request of the load and its exchange."""

    prompt: str
    output_tokens: int
    exchange: Exchange

    def read(self) -> Answer:
        """What the exchange brought."""
        return read_answer(self.prompt, self.output_tokens, self.exchange)


@dataclass(slots=True)
class Load:
    """What was sent and came back, unread; times are seconds of `time.monotonic()`."""

    begin: float
    sent: list[Sent] = field(default_factory=list)
    end: float = 0.0
    full: tuple[float, float] | None = None
    """From when until when every client of a closed loop had work."""

    def read(self) -> Run:
        """Read all answers, which takes too long to do while others come."""
        return Run([each.read() for each in self.sent], self.begin, self.end, self.full)


async def closed_loop(
    target: Target, conversations: Iterator[Conversation], clients: int, count: int
) -> Load:
    """Run `count` conversations with `clients` at a time: whoever is done begins the next."""
    queue = islice(conversations, count)
    connections = [await Connection.open(target.host, target.port) for _ in range(clients)]
    load, ends = Load(time.monotonic()), list[float]()

    async def work(connection: Connection) -> None:
        for conversation in queue:
            connection = await _converse(target, connection, conversation, load.sent)
        ends.append(time.monotonic())
        connection.close()

    with _NoCollection():
        await asyncio.gather(*map(work, connections))
    # The first requests of all clients were sent before any client's second.
    firsts = sorted((each.exchange for each in load.sent), key=lambda each: each.sent)[:clients]
    load.end = max(ends)
    began = max((each.pieces[0][0] for each in firsts if each.pieces), default=load.end)
    load.full = (began, min(ends))
    return load


async def open_loop(
    target: Target, conversations: Iterator[Conversation], arrivals: Iterator[float], count: int
) -> Load:
    """Begin `count` conversations at times that do not depend on the server.

    A request counts as sent when it was due, even if this process was late.
    """
    load, idle = Load(time.monotonic() + _LEAD_S), list[Connection]()

    async def work(due: float, conversation: Conversation) -> None:
        await asyncio.sleep(due - time.monotonic())
        connection = idle.pop() if idle else Connection()
        connection = await _converse(target, connection, conversation, load.sent, due)
        idle.append(connection)

    with _NoCollection():
        await asyncio.gather(
            *(
                work(load.begin + after, conversation)
                for after, conversation in islice(zip(arrivals, conversations, strict=False), count)
            )
        )
    load.end = time.monotonic()
    for connection in idle:
        connection.close()
    return load


async def _converse(
    target: Target,
    connection: Connection,
    conversation: Conversation,
    sent: list[Sent],
    due: float | None = None,
) -> Connection:
    """Hold a conversation until its end or an error; returns the connection for the next one."""
    prompt = conversation.prefix
    for number, turn in enumerate(conversation.turns, 1):
        prompt += turn.text
        request = target.request(prompt, turn.output_tokens)
        try:
            if not connection.usable:
                connection = await Connection.open(target.host, target.port)
            exchange = await connection.exchange(request, target.timeout_s)
        except OSError as error:
            exchange = Exchange(time.monotonic(), error=f"cannot connect: {error}")
        if due is not None and number == 1:
            exchange.sent = due
        latest = Sent(prompt, turn.output_tokens, exchange)
        sent.append(latest)
        if number < len(conversation.turns):
            answer = latest.read()
            if answer.error is not None:
                break
            prompt += answer.text
    return connection


class _NoCollection:
    """Garbage collection walks over every note of the run, and would stop the clock of all."""

    def __enter__(self) -> None:
        gc.collect()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        gc.enable()
