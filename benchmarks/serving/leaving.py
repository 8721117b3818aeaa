"""Clients that leave a stream before, while or after it comes, in every way that TCP has."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import http.client
import json
import random
import socket
import struct
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.serving.conversations import Mix
from benchmarks.serving.load import Target

END = b"0\r\n\r\n"
"""Last bytes of a chunked body (RFC 9112, 7.1)."""
_LINGER_NOT = struct.pack("ii", 1, 0)
"""`struct linger` by which closing a socket sends RST instead of FIN (man socket)."""
_HALF_CLOSED_S = 0.5
"""How long a client reads on that has closed its way out."""
_POLL_S = 0.02
_PROMPTS = 0
"""Seed of the prompts."""


class Cut(enum.StrEnum):
    """When and how a client leaves."""

    IN_REQUEST = "in the request"
    BEFORE_FIRST = "before the first token"
    MID_STREAM = "in the middle"
    AFTER_LAST = "after the last byte"
    HALF_CLOSED = "in the middle, by closing the way out alone"
    RESET = "in the middle, by RST"


@dataclass(frozen=True)
class Leaver:
    """One client: what it asks for, and when it leaves."""

    request: bytes
    cut: Cut
    after_s: float
    """Seconds after the request was sent; not used for `AFTER_LAST`."""


@dataclass(slots=True)
class Left:
    """What a client had received when it left."""

    cut: Cut
    received: bytes = b""
    error: str | None = None

    @property
    def status(self) -> int | None:
        """The HTTP status, if one came."""
        return int(self.received.split(b" ", 2)[1]) if self.received else None

    @property
    def whole(self) -> bool:
        """Whether the answer had come to its end."""
        return self.received.endswith(END)


def draw_leavers(target: Target, latest_s: float, step_s: float, seed: int) -> Iterator[Leaver]:
    """Clients without end, of all kinds in turn, with about 100 tokens of prompt.

    The prompts do not depend on the seed, so that what a server remembers of texts does not grow
    from round to round, as a leak does.

    Args:
        target: the server.
        latest_s: seconds after its request within which each leaves; some do so right then.
        step_s: seconds of an engine's step. The answers would take two to four times `latest_s`,
            but for those whose end is waited for, which take at most half of it.
        seed: of when they leave.
    """
    rng, steps = random.Random(seed), max(round(latest_s / step_s), 4)
    long = Mix((80, 120), (2 * steps, 4 * steps)).draw(_PROMPTS)
    short = Mix((80, 120), (1, steps // 2)).draw(_PROMPTS)
    while True:
        for cut in Cut:
            turn = next(short if cut is Cut.AFTER_LAST else long).turns[0]
            request = target.request(turn.text, turn.output_tokens)
            after_s = min(rng.uniform(0.0, 1.25 * latest_s), latest_s)
            early = cut in (Cut.IN_REQUEST, Cut.BEFORE_FIRST)
            yield Leaver(request, cut, after_s / 20 if early else after_s)


async def run_leavers(target: Target, leavers: list[Leaver]) -> list[Left]:
    """Run all of them at once, to the last one's leaving."""
    return await asyncio.gather(*(_run(target, leaver) for leaver in leavers))


async def _run(target: Target, leaver: Leaver) -> Left:
    left = Left(leaver.cut)
    try:
        reader, writer = await asyncio.open_connection(target.host, target.port)
    except OSError as error:
        left.error = str(error)
        return left
    try:
        async with asyncio.timeout(None if leaver.cut is Cut.AFTER_LAST else leaver.after_s):
            await _talk(leaver, reader, writer, left)
    except TimeoutError:
        if leaver.cut is Cut.HALF_CLOSED:
            await _half_close(reader, writer, left)
    except OSError as error:
        left.error = str(error)
    finally:
        if leaver.cut is Cut.RESET:
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
        writer.transport.abort()
    return left


async def _talk(
    leaver: Leaver, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: Left
) -> None:
    """Send the request, or half of it, and read until the end."""
    if leaver.cut is Cut.IN_REQUEST:
        writer.write(leaver.request[: len(leaver.request) // 2])
        await asyncio.sleep(leaver.after_s)
        return
    writer.write(leaver.request)
    await _read(reader, left)


async def _read(reader: asyncio.StreamReader, left: Left) -> None:
    while not left.whole and (data := await reader.read(65536)):
        left.received += data


async def _half_close(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: Left
) -> None:
    """Say that nothing more is sent, and read for a while."""
    with contextlib.suppress(OSError, TimeoutError):
        writer.write_eof()
        async with asyncio.timeout(_HALF_CLOSED_S):
            await _read(reader, left)


def read_health(target: Target) -> dict[str, Any]:
    """The answer of `/health`.

    Raises:
        OSError: there is none, or only a part of one.
    """
    # No proxy: the environment's `http_proxy` would be asked even for this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{target.host}:{target.port}/health", timeout=10) as response:
            answer: dict[str, Any] = json.load(response)
            return answer
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f"no whole answer of /health: {error!r}") from error


def is_free(health: dict[str, Any]) -> bool:
    """Whether no engine has a request, nor a block that one holds."""
    return bool(health["engines"]) and all(
        engine["running"] == engine["waiting"] == engine["booked"] == 0
        and engine["free_blocks"] == engine["total_blocks"]
        for engine in health["engines"]
    )


def seconds_until_free(target: Target, limit_s: float) -> float:
    """Wait until all is free; returns how long it took.

    Raises:
        TimeoutError: it took longer than `limit_s`.
    """
    begin = time.monotonic()
    while not is_free(health := read_health(target)):
        if time.monotonic() - begin > limit_s:
            raise TimeoutError(f"not free after {limit_s:.0f} s: {health['engines']}")
        time.sleep(_POLL_S)
    return time.monotonic() - begin
