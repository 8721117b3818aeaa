"""Runs an engine in a thread of its own: commands in, deltas of each step out."""

from __future__ import annotations

import logging
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from engine.errors import InvalidRequest, StepFailed
from engine.outputs import EngineLoad, TokenDelta, refusal
from engine.request import EngineRequest
from engine.snapshot import EngineSnapshot

logger = logging.getLogger("trunkline.engine")

IDLE_WAKEUP_S = 1.0
"""An idle loop looks around this often, so that silence means trouble."""
COMPILERS = ("triton.compiler.compiler", "triton.backends.nvidia.compiler")
"""Modules that compile kernels. `triton.runtime`, which launches them too, is none of these."""


class Core(Protocol):
    """The part of `EngineCore` that the loop drives."""

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""

    def add(self, wire: EngineRequest) -> None:
        """Queue a request; InvalidRequest if it can never run."""

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests without another word."""

    def step(self) -> list[TokenDelta]:
        """Do one step and return what is new; StepFailed if it is lost but the core goes on."""

    def load(self) -> EngineLoad:
        """The load after the last step."""

    def fail_all(self, error: str) -> list[TokenDelta]:
        """End every request with an error."""

    def snapshot(self) -> EngineSnapshot:
        """What the core is at; called from any thread, even while a step hangs."""

    def check_invariants(self) -> None:
        """Raise if the bookkeeping contradicts itself."""


OnStep = Callable[[list[TokenDelta], EngineLoad], None]
OnDeath = Callable[[BaseException], None]


class EngineLoop:
    """Drives a core until stopped or until it cannot go on.

    `on_step` is called in the loop's thread after every step, and with no deltas at least every
    `IDLE_WAKEUP_S` while idle. A refused request is told so alone, and so are those of a step that
    failed. Whatever else a step raises ends the loop: every request is told so through `on_step`,
    then `on_death` gets the exception.
    """

    def __init__(self, core: Core, on_step: OnStep, on_death: OnDeath) -> None:
        self.last_progress = time.monotonic()
        """`time.monotonic()` of the last finished step or idle wake-up.

        A step that failed does not count."""
        self._core = core
        self._on_step = on_step
        self._on_death = on_death
        self._death: BaseException | None = None
        self._last_state: EngineSnapshot | None = None
        self._refused: list[TokenDelta] = []
        self._num_received = 0
        self._new_requests = self._new_tokens = 0
        self._inbox: queue.SimpleQueue[list[EngineRequest] | list[str] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the loop still runs."""
        return self._death is None and self._thread.is_alive()

    @property
    def compiling(self) -> bool:
        """Whether a kernel is compiled now, at its first use: that may take many seconds.

        Told by the stack of the loop's thread, so that steps need not say anything.
        """
        frame = sys._current_frames().get(self._thread.ident or 0)
        while frame is not None:
            if frame.f_globals.get("__name__") in COMPILERS:
                return True
            frame = frame.f_back
        return False

    def snapshot(self) -> EngineSnapshot | None:
        """What the core is at, or was when the loop died; None if it could not tell then."""
        return self._core.snapshot() if self._death is None else self._last_state

    def submit(self, requests: list[EngineRequest]) -> None:
        """Queue requests; returns at once, from any thread."""
        self._inbox.put(requests)

    def abort(self, request_ids: list[str]) -> None:
        """End requests; returns at once, from any thread."""
        self._inbox.put(request_ids)

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the loop after the current step and wait for it."""
        self._inbox.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while self._take_commands():
                self._tell(self._step(), self._core.load())
        except BaseException as error:
            self._death = error  # its frames may hold memory that a lost device cannot free
            logger.exception("the engine loop died")
            try:
                self._last_state = self._core.snapshot()
            except Exception:
                logger.exception("its state could not be kept")
            try:
                failed = self._core.fail_all("The engine failed while it ran the request.")
                self._tell(failed, EngineLoad())
            except Exception:
                logger.exception("its requests could not be told")
            self._on_death(error)

    def _step(self) -> list[TokenDelta]:
        deltas: list[TokenDelta] = []
        if self._core.has_work:
            try:
                deltas = self._core.step()
            except StepFailed as failure:
                logger.exception("a step failed; requests lost with it: %d", len(failure.deltas))
                return failure.deltas
        self.last_progress = time.monotonic()
        return deltas

    def _tell(self, deltas: list[TokenDelta], load: EngineLoad) -> None:
        refused, self._refused = self._refused, []
        load.num_received = self._num_received
        load.new_requests, load.new_tokens = self._new_requests, self._new_tokens
        self._on_step(refused + deltas, load)

    def _take_commands(self) -> bool:
        """Carry out what is in the inbox; False when told to stop."""
        for command in self._commands():
            if command is None:
                return False
            self._carry_out(command)
        return True

    def _commands(self) -> Iterator[list[EngineRequest] | list[str] | None]:
        """What is in the inbox; waits for it while there is nothing else to do."""
        idle = not self._core.has_work
        while True:
            try:
                yield self._inbox.get(idle, IDLE_WAKEUP_S)
            except queue.Empty:
                if idle:  # there is time to look whether anything leaked
                    self._core.check_invariants()
                return
            idle = False

    def _carry_out(self, command: list[EngineRequest] | list[str]) -> None:
        for item in command:
            if isinstance(item, str):
                self._core.abort((item,))
                continue
            self._num_received += 1
            try:
                self._core.add(item)
            except InvalidRequest as error:
                self._refused.append(refusal(item.request_id, error))
            else:
                self._count(item)

    def _count(self, taken: EngineRequest) -> None:
        """Count what comes when it comes: what waits also changes when clients give up, and when
        requests are preempted."""
        if not taken.resumed:
            self._new_requests += 1
            self._new_tokens += len(taken.prompt_token_ids)
