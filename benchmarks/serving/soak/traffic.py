"""The clients of a soak."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence

from benchmarks.serving.client import Connection, Exchange, Receiver
from benchmarks.serving.load import Target
from benchmarks.serving.soak.outcome import Sent
from benchmarks.serving.soak.scripts import Script

ANSWER_LIMIT_S = 240.0
"""A request without the end of an answer by then is lost."""
LEAVE_SHARE = 0.15
"""So many of the clients leave, within `_LEAVE_S` seconds."""
_LEAVE_S = 4.0


async def ask(
    target: Target, receiver: Receiver, script: Script, leave_s: float | None = None
) -> Sent:
    """Send a request over a connection of its own, and perhaps leave after some seconds."""
    try:
        connection = await Connection.open(receiver, target.host, target.port)
    except OSError as error:
        exchange = Exchange(time.monotonic(), error=f"cannot connect: {error}")
        return Sent(script, exchange, False, time.monotonic())
    loop, left = asyncio.get_running_loop(), asyncio.Event()

    def leave() -> None:
        left.set()
        connection.close()

    leaving = None if leave_s is None else loop.call_later(leave_s, leave)
    exchange = await connection.exchange(script.request(target), ANSWER_LIMIT_S)
    if leaving:
        leaving.cancel()
    connection.close()
    return Sent(script, exchange, left.is_set(), time.monotonic())


class Crowd:
    """Clients that come one after another, so many at a time, and bursts of them.

    Args:
        target: the server.
        receiver: receives for all of them.
        scripts: what they ask for.
        clients: at a time.
        seed: of all that is random.
    """

    def __init__(
        self,
        target: Target,
        receiver: Receiver,
        scripts: Sequence[Script],
        clients: int,
        seed: int,
    ) -> None:
        self._target = target
        self._receiver = receiver
        self._scripts = scripts
        self._clients = clients
        self._random = random.Random(seed)

    async def come(self, seconds: float, burst: int) -> list[Sent]:
        """Have clients come for so long, once many at a time; returns when all have ended."""
        end = time.monotonic() + seconds
        sent: list[Sent] = []
        burst_after = self._random.uniform(0.0, seconds)
        await asyncio.gather(
            *(self._keep_asking(end, sent) for _ in range(self._clients)),
            *(self._ask_once(sent, burst_after) for _ in range(burst)),
        )
        return sent

    async def _keep_asking(self, end: float, sent: list[Sent]) -> None:
        while time.monotonic() < end:
            await self._ask_once(sent, self._random.expovariate(4.0))

    async def _ask_once(self, sent: list[Sent], pause_s: float) -> None:
        await asyncio.sleep(pause_s)
        leaves = self._random.random() < LEAVE_SHARE
        leave_s = self._random.uniform(0.0, _LEAVE_S) if leaves else None
        script = self._random.choice(self._scripts)
        sent.append(await ask(self._target, self._receiver, script, leave_s))
