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
from benchmarks.serving.client import LOST, Connection, Exchange, Receiver
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
    queue, ends = islice(conversations, count), list[float]()

    async def work(client: _Client) -> None:
        for conversation in queue:
            await client.converse(conversation)
        ends.append(time.monotonic())

    with Receiver() as receiver, _NoCollection():
        load = Load(time.monotonic())
        working = [_Client(target, receiver, load.sent) for _ in range(clients)]
        for client in working:
            await client.connect()
        load.begin = time.monotonic()
        await asyncio.gather(*map(work, working))
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
    load, idle = Load(time.monotonic() + _LEAD_S), list[_Client]()

    async def work(due: float, conversation: Conversation) -> None:
        await asyncio.sleep(due - time.monotonic())
        client = idle.pop() if idle else _Client(target, receiver, load.sent)
        await client.converse(conversation, due)
        idle.append(client)

    with Receiver() as receiver, _NoCollection():
        await asyncio.gather(
            *(
                work(load.begin + after, conversation)
                for after, conversation in islice(zip(arrivals, conversations, strict=False), count)
            )
        )
    load.end = time.monotonic()
    return load


class _Client:
    """Holds one conversation at a time, over one connection as long as it lasts."""

    def __init__(self, target: Target, receiver: Receiver, sent: list[Sent]) -> None:
        self._target = target
        self._receiver = receiver
        self._sent = sent
        self._connection: Connection | None = None

    async def connect(self) -> Connection:
        """Open a connection.

        Raises:
            OSError: nobody answers there.
        """
        target = self._target
        self._connection = await Connection.open(self._receiver, target.host, target.port)
        return self._connection

    async def converse(self, conversation: Conversation, due: float | None = None) -> None:
        """Hold a conversation until its end or an error; `due` is when it should have begun."""
        prompt = conversation.prefix
        for turn in conversation.turns:
            prompt += turn.text
            if turn.pause_s:
                await asyncio.sleep(turn.pause_s)
            exchange = await self._exchange(self._target.request(prompt, turn.output_tokens))
            if due is not None and turn is conversation.turns[0]:
                exchange.sent = due
            latest = Sent(prompt, turn.output_tokens, exchange)
            self._sent.append(latest)
            if turn is not conversation.turns[-1]:
                answer = latest.read()
                if answer.error is not None:
                    return
                prompt += answer.text

    async def _exchange(self, request: bytes) -> Exchange:
        kept, timeout_s = self._connection, self._target.timeout_s
        if kept is not None and not kept.lost:
            exchange = await kept.exchange(request, timeout_s)
            if exchange.error != LOST or exchange.status:
                return exchange
            # The server closed it just when it was used again: HTTP clients then try a new one.
        try:
            connection = await self.connect()
        except OSError as error:
            return Exchange(time.monotonic(), error=f"cannot connect: {error}")
        return await connection.exchange(request, timeout_s)


class _NoCollection:
    """Garbage collection walks over every note of the run, and would stop the clock of all."""

    def __enter__(self) -> None:
        gc.collect()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        gc.enable()
