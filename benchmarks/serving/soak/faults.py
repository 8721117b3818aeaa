"""Strikes processes of a server at random."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from benchmarks.serving.fake_server import FakeServer, fake_target
from benchmarks.serving.leaving import read_health
from benchmarks.serving.processes import find_processes
from benchmarks.serving.soak.outcome import Window

FAULTS = {
    "kill engine_actor": 6.0,
    "pause engine_actor": 3.0,
    "stop engine_actor": 2.0,
    "kill engine_replica": 4.0,
    "pause engine_replica": 1.0,
    "kill controller": 3.0,
    "update": 1.5,
    "kill ingress": 1.0,
    "pause ingress": 1.0,
    "kill haproxy": 0.5,
}
"""What happens to which process, and how often in proportion. `pause` stops it for a few seconds,
`stop` for good: the server has to notice and to replace it."""
FRONTENDS = ("ingress", "haproxy")
_PAUSE_S = (0.5, 6.0)
_FRESH_S = 1.2
"""An engine that has told its load so lately lives."""
_POLL_S = 0.2
_AWAY_S = 1.0
"""For so long at least a process is away that was killed."""
_BACK_LIMIT_S = 60.0


class Striker:
    """Strikes while the server is whole enough for the fault to be survived.

    Args:
        fake: the server.
        faults: those of `FAULTS` that happen.
        seed: of all that is random.
    """

    def __init__(self, fake: FakeServer, faults: Sequence[str], seed: int) -> None:
        self.struck: list[dict[str, Any]] = []
        """What was done and when, in seconds since the start."""
        self.windows: list[Window] = []
        """When a frontend was away."""
        self._fake = fake
        self._target = fake_target(fake)
        self._faults = faults
        self._random = random.Random(seed)
        self._begin = time.monotonic()
        self._max_num_seqs = int(fake["max_num_seqs"])
        self._stopped: set[int] = set()

    def draw_pause(self, mean_s: float) -> float:
        """Seconds until the next fault."""
        return self._random.expovariate(1 / mean_s)

    async def strike(self) -> None:
        """One fault, as soon as two engines are well; none if that takes too long."""
        (fault,) = self._random.choices(self._faults, [FAULTS[name] for name in self._faults])
        deadline = time.monotonic() + _BACK_LIMIT_S
        while not await asyncio.to_thread(self._is_well):
            if time.monotonic() > deadline:
                return
            await asyncio.sleep(_POLL_S)
        self.struck.append({"after_s": round(time.monotonic() - self._begin, 1), "fault": fault})
        if fault == "update":
            self._max_num_seqs ^= 1
            await asyncio.to_thread(self._fake.redeploy, max_num_seqs=self._max_num_seqs)
            return
        action, role = fault.split(" ")
        pids = await asyncio.to_thread(find_processes, self._fake["pid"], role)
        alive = [pid for pid in pids if pid not in self._stopped]
        if alive:
            await self._do(action, role, self._random.choice(alive), len(pids))

    async def _do(self, action: str, role: str, pid: int, count: int) -> None:
        begin = time.monotonic()
        with suppress(ProcessLookupError):  # it has just ended by itself
            os.kill(pid, signal.SIGKILL if action == "kill" else signal.SIGSTOP)
            if action == "pause":
                await asyncio.sleep(self._random.uniform(*_PAUSE_S))
                os.kill(pid, signal.SIGCONT)
        if action == "stop":
            self._stopped.add(pid)
        elif action == "kill" and role in FRONTENDS:
            await self._await_return(role, count if role == "ingress" else 1)
            self.windows.append((begin, time.monotonic()))

    async def _await_return(self, role: str, count: int) -> None:
        """Wait until so many processes are there, and the server answers."""
        deadline = time.monotonic() + _BACK_LIMIT_S
        await asyncio.sleep(_AWAY_S)
        while time.monotonic() < deadline:
            pids = await asyncio.to_thread(find_processes, self._fake["pid"], role)
            if len(pids) >= count and await asyncio.to_thread(self._is_well):
                return
            await asyncio.sleep(_POLL_S)

    def _is_well(self) -> bool:
        try:
            engines = read_health(self._target)["engines"]
        except OSError:
            return False
        ages = [engine["age_s"] for engine in engines]
        return len([age for age in ages if age is not None and age < _FRESH_S]) >= 2
