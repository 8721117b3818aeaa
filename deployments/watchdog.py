"""What notices that a process, a step or an event loop stands still, and ends what does."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger("ray.serve")

LOOK_S = 0.5
"""How often a watchdog looks."""
EXIT_DELAY_S = 0.5
"""Time for the last messages of a process to leave before it ends."""
SILENCE_LIMIT_S = 8.0
"""What shows no life for longer is taken for lost, whoever looks at whom: ingress, replica, engine
and step. With this, requests are at work elsewhere within the 10 s that are promised."""
GPU_STALL_LIMIT_S = SILENCE_LIMIT_S
"""A step on a GPU may rightly last this long, and longer where the start has shown so: the largest
takes below half a second on a fast GPU, but many on a slow one with a large model."""
CPU_STALL_LIMIT_S = 60.0
"""The same on a CPU."""
STEP_MARGIN = 5.0
"""How much slower than at the start the largest step may be: it attends over long contexts, and
others want the device."""
OVERDUE_SHARE = 0.3
"""An engine whose step has lasted for more than this share of its limit is given no new requests,
2.4 s on most GPUs. The largest step at the speed of the start takes 1 / `STEP_MARGIN` of it."""
WARM_UP_TOKENS = 16
"""Tokens that the stage `warm-up` of a start computes at once. Fewer at a time cost more for each,
so that its seconds are more than these tokens would take as a part of the largest step."""
COMPILE_LIMIT_S = 60.0
"""So long a step may compile kernels at their first use, beside the limit."""
LAG_LOOK_S = 0.25
"""How often the lag of an event loop is measured."""
LAG_KEPT = 40
"""Measurements, those of ten seconds, of which the worst is told."""
LAG_WARNING_S = 0.5
"""A lag of an event loop that is worth a warning: every stream of the process pauses as long."""
WARNING_INTERVAL_S = 30.0
"""Warnings are no closer to each other."""


@dataclass(frozen=True, slots=True)
class WatchOptions:
    """See `DeploymentOptions`."""

    stall_limit_s: float | None = None
    crash_dump_dir: str | None = None

    @property
    def off(self) -> bool:
        """Whether an engine and its replica let each other stand still, as under a debugger."""
        return self.stall_limit_s == 0


def end_process() -> None:
    """End this process at once, whatever its threads hang in."""
    os._exit(1)


def kill_process(pid: int) -> None:
    """End a process of this machine that may be stopped, or may have ended.

    What cannot be ended, as its id belongs to another user's process now, is left.
    """
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)


def ask_for_stacks(pid: int) -> None:
    """Have an engine actor write the stacks of its threads to its error log; see `faulthandler`.

    Works while no thread can run Python, but not while the process is stopped.
    """
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGUSR2)


def stall_limit(info: Mapping[str, Any]) -> float:
    """Seconds after which a step counts as hung, compilation apart.

    It follows from what the engine can do, with a margin: on a GPU from the seconds of the largest
    step, which the start runs; on a CPU from those of each token of a small one times the tokens of
    the largest.

    Args:
        info: fields of the engine's `EngineInfo`.
    """
    stages: Mapping[str, float] = info["startup_seconds"]
    if info["device"] != "cpu":
        return max(GPU_STALL_LIMIT_S, STEP_MARGIN * stages.get("largest step", 0.0))
    token_s = stages.get("warm-up", 0.0) / WARM_UP_TOKENS
    largest_step: int = info["max_num_batched_tokens"]
    return max(CPU_STALL_LIMIT_S, STEP_MARGIN * token_s * largest_step)


class Silence:
    """Seconds for which something that is looked at has shown no life.

    To be looked at every `LOOK_S`: between two looks no more than twice that counts, as a process
    that was held up itself, stopped and continued say, could not have noticed life.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = 0.0
        self._clock = clock
        self._last_look = clock()

    def end(self) -> None:
        """There was life."""
        self.seconds = 0.0
        self._last_look = self._clock()

    def look(self, counts: bool = True) -> float:
        """Add the time since the last look if it counts; returns `seconds`."""
        now = self._clock()
        if counts:
            self.seconds += min(now - self._last_look, 2 * LOOK_S)
        self._last_look = now
        return self.seconds


class StepWatch:
    """Tells when a step hangs.

    Args:
        limit_s: longest time without progress, see `stall_limit`.
        clock: seconds, never going back.
    """

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_s = limit_s
        self._progress = 0.0
        self._step = Silence(clock)
        self._compilation = Silence(clock)

    def stalled(self, progress: float, compiling: Callable[[], bool]) -> bool:
        """Look whether there is progress; to be called every `LOOK_S`.

        Args:
            progress: changes with every step, and now and then without work.
            compiling: whether a kernel is compiled now; asked only if `progress` has not changed.
        """
        if progress != self._progress:
            self._progress = progress
            self._step.end()
            self._compilation.end()
            return False
        is_compiling = compiling()
        compiled_s = self._compilation.look(is_compiling)
        return self._step.look(not is_compiling) > self.limit_s or compiled_s > COMPILE_LIMIT_S

    def overdue(self, progress: float) -> bool:
        """Whether a step has lasted longer than it should, though it may still end.

        Args:
            progress: as for `stalled`.
        """
        late = self._step.seconds > OVERDUE_SHARE * self.limit_s
        return late and progress == self._progress


class LoopLag:
    """Measures how late the event loop that it runs in comes to what is due.

    Args:
        name: of the process, for the log.
        record: gets `worst_s` after every measurement.
        log: gets a warning when one is over `LAG_WARNING_S`.
    """

    def __init__(
        self, name: str, record: Callable[[float], None], log: logging.Logger = logger
    ) -> None:
        self._name = name
        self._record = record
        self._log = log
        self._recent: deque[float] = deque(maxlen=LAG_KEPT)
        self._next_warning = 0.0

    @property
    def worst_s(self) -> float:
        """Longest lag of the last ten seconds."""
        return max(self._recent, default=0.0)

    async def run(self) -> None:
        """Measure until cancelled."""
        while True:
            due = time.monotonic() + LAG_LOOK_S
            await asyncio.sleep(LAG_LOOK_S)
            now = time.monotonic()
            self.take(now - due, now)

    def take(self, lag_s: float, now: float) -> None:
        """Take over a measurement made at a time."""
        self._recent.append(lag_s)
        self._record(self.worst_s)
        if lag_s > LAG_WARNING_S and now >= self._next_warning:
            self._next_warning = now + WARNING_INTERVAL_S
            self._log.warning(
                "the event loop of %s came %.1f s late to what was due: something blocks it, or "
                "the machine has too few cores for what it runs",
                self._name,
                lag_s,
            )
