"""Looks after an engine inside of its process, and ends what cannot go on."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import signal
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from deployments import crash_dump, watchdog
from deployments.crash_dump import (
    describe_error,
    describe_state,
    thread_stacks,
    write_aside,
    write_crash_dump,
)
from deployments.engine_state import SILENT_S
from deployments.watchdog import Silence, StepWatch, WatchOptions
from engine.config import EngineConfig

if TYPE_CHECKING:
    from engine.loop import EngineLoop

logger = logging.getLogger("trunkline.actor")

DEAF_LIMIT_S = watchdog.SILENCE_LIMIT_S
"""A replica that has taken no report for this long, though they come every second, is stopped or
hangs: Serve's calls of new requests would wait there, and nobody would count ends. Serve would take
three failed health checks to replace it."""
STDERR = 2
"""File descriptor; Ray makes it a file with its other logs."""


class EngineGuard:
    """Ends the process when the engine's loop dies or hangs, and the replica when that hangs.

    Belongs to one event loop.

    Args:
        config: of the engine.
        options: limits and folders.
        info: fields of its `EngineInfo`.
        loop: to look after.
        tell: gets, once, why the engine ends; what it sends off has `EXIT_DELAY_S` to leave.

    Attributes:
        dumped: set once the crash dump is written, or given up.
    """

    def __init__(
        self,
        config: EngineConfig,
        options: WatchOptions,
        info: Mapping[str, Any],
        loop: EngineLoop,
        tell: Callable[[str], None],
    ) -> None:
        self._config = config
        self._dump_folder = options.crash_dump_dir
        self._off = options.off
        self._steps = StepWatch(options.stall_limit_s or watchdog.stall_limit(info))
        self._loop = loop
        self._tell = tell
        self._over = False
        self.dumped = asyncio.Event()
        self._replica = Silence()
        self._replica_pid = 0
        """0 before it reads."""
        faulthandler.register(signal.SIGUSR2, STDERR)  # see `ask_for_stacks`

    def note_reading(self, replica_pid: int) -> None:
        """Take over that the replica, whose process this is, has read a report."""
        self._replica_pid = replica_pid
        self._replica.end()

    @property
    def overdue(self) -> bool:
        """Whether new requests had better go elsewhere: a step takes long, see `StepWatch.overdue`,
        the replica, which counts them, has been silent, or the engine has ended, which
        in its last messages would seem to be the idlest of all."""
        deaf = self._replica.seconds > SILENT_S
        over = self._over or not self._loop.alive
        return over or deaf or self._steps.overdue(self._loop.last_progress)

    def end(self, error: BaseException) -> None:
        """End the engine, as its loop has died of an exception."""
        try:
            message = f"{type(error).__name__}: {error}"
        except Exception:  # it cannot be told as a text
            message = type(error).__name__
        self._end(message, "exception", lambda: {"error": describe_error(error)})

    async def run(self) -> None:
        """Look, until the engine ends or this is cancelled."""
        while not (self._over or self._off):
            await asyncio.sleep(watchdog.LOOK_S)
            if self._steps.stalled(self._loop.last_progress, lambda: self._loop.compiling):
                self._end_hung()
            elif self._replica_pid and self._replica.look() > DEAF_LIMIT_S:
                logger.error("the replica has read no report for %.0f s; killing it", DEAF_LIMIT_S)
                watchdog.kill_process(self._replica_pid)
                self._replica_pid = 0  # Ray ends this process with its owner

    def _end_hung(self) -> None:
        message = (
            f"no step has ended for {self._steps.limit_s:.0f} s; where steps may rightly take "
            "longer, raise stall_limit_s or lower max_num_batched_tokens"
        )
        self._end(message, "stall", lambda: {"error": message, "threads": thread_stacks()})

    def _end(self, message: str, reason: str, describe: Callable[[], dict[str, Any]]) -> None:
        """Tell everyone, as requests wait to move, then leave a dump and end the process."""
        if self._over:
            return
        self._over = True
        # It begins in a later turn of the loop, and even if those who are told raise.
        self._leaving = asyncio.create_task(self._leave(partial(self._dump, reason, describe)))
        self._tell(message)

    async def _leave(self, dump: Callable[[], None]) -> None:
        """End the process once the dump is written, and what was told has left, or time is up."""
        await asyncio.wait([write_aside(dump)], timeout=crash_dump.WRITE_LIMIT_S)
        self.dumped.set()
        await asyncio.sleep(watchdog.EXIT_DELAY_S)
        watchdog.end_process()

    def _dump(self, reason: str, describe: Callable[[], dict[str, Any]]) -> None:
        try:
            state = describe_state(self._loop.snapshot())
        except Exception:  # the loop may be in the midst of changing it
            logger.exception("its state could not be read")
            state = None
        engine = self._config.model_dump(mode="json")
        write_crash_dump(self._dump_folder, reason, engine=engine, state=state, **describe())
