"""Grammars as the engine sees them: processes that compile, and then give masks."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import socket
import struct
import subprocess
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import msgspec
import numpy as np

from engine.child_process import module_command, module_environment
from engine.structured_outputs.mask_memory import MaskMemory
from engine.structured_outputs.messages import MaskRequest, RowState, RowStatus, Setup, encode
from engine.structured_outputs.params import GrammarSource

MASK_WAIT_S = 10
"""Seconds after which a process that gives no mask is given up. Its processor time ends long
before, unless the machine stands still."""
RETRY_AFTER_S = 60.0
"""A grammar that has failed is refused at once for so long."""
TOO_MUCH = "takes too much time or memory to compile; make it simpler."
TOO_SLOW = "takes too long to match; make it simpler."
NOT_STARTED = "The engine cannot start the process that follows the output's form; try again."
MAX_STARTS = 3
"""So often in a row is the first process started for a request; then the request fails."""

logger = logging.getLogger("trunkline.engine")


class GrammarHost:
    """Starts processes for grammars, by way of one that has the library and the vocabulary.

    That one starts when it is first needed, and ends with this object.

    Args:
        setup: of the processes.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.failed_starts = 0
        """In a row."""
        self._control: socket.socket | None = None
        self._end: Callable[[], object] | None = None

    def discard(self, control: socket.socket | None) -> None:
        """Start anew with the next connection, if `control` is still what leads to the process."""
        if self._end is not None and control is self._control:
            self._end()
            self._control = None
            self.failed_starts += 1

    def connect(self, memory: MaskMemory) -> tuple[Connection, socket.socket]:
        """A connection to a new process that has the memory, and for `discard` what led to it."""
        if self._control is None:
            self._control = self._start()
        ours, theirs = socket.socketpair()
        # Should that process have just ended, so does the connection.
        with theirs, contextlib.suppress(ConnectionError):
            socket.send_fds(self._control, [b"."], [theirs.fileno(), memory.file])
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", MASK_WAIT_S, 0))
        return Connection(ours.detach()), self._control

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        setup = msgspec.json.encode(self.setup).decode()
        environment = {
            **module_environment(),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",  # threads of a process are lost in what it forks
        }
        with theirs:
            try:
                process = subprocess.Popen(
                    module_command("engine.structured_outputs.process", setup),
                    stdin=theirs.fileno(),
                    env=environment,
                )
            except OSError:  # no memory or no process is left; connections end at once
                logger.exception("the process for grammars cannot be started")
                self._end = ours.close
                return ours
        self._end = weakref.finalize(self, _end, ours, process)
        return ours


def _end(control: socket.socket, process: subprocess.Popen[bytes]) -> None:
    """End the process: it does so by itself when its input ends, unless it is still starting."""
    control.close()
    process.terminate()
    process.wait()


@dataclass(eq=False, slots=True, weakref_slot=True)
class Matcher:
    """One output that a grammar follows. What it has come to is a function of the tokens alone."""

    grammar: Grammar
    matcher_id: int
    num_sent: int = 0
    """Output tokens that the grammar's process knows."""


class Grammar:
    """A grammar: first it compiles, then it gives masks or is of no use.

    Args:
        source: what to compile.
        host: starts its process.
    """

    def __init__(self, source: GrammarSource, host: GrammarHost) -> None:
        self.error: str | None = None
        """Why it is of no use, to be read after the name of a field."""
        self.compiling = True
        self._retry_at = math.inf
        self._started = False
        """Whether its process has: that says so by an empty message."""
        self._ids = itertools.count()
        self._live: set[int] = set()
        self._ended: list[int] = []
        self._memory = MaskMemory(host.setup.width)
        self._host = host
        self.connection, self._control = host.connect(self._memory)
        self._send(source)

    @property
    def never_started(self) -> bool:
        """Whether its process has ended before it could say anything: no fault of its own."""
        return self.error is not None and not self._started

    @property
    def may_be_retried(self) -> bool:
        """Whether it is of no use but another try may go another way."""
        return self.error is not None and time.monotonic() >= self._retry_at

    @property
    def in_use(self) -> bool:
        """Whether any output is matched, or waits to be."""
        return bool(self._live)

    def matcher(self) -> Matcher:
        """Follow an output from its beginning."""
        matcher = Matcher(self, next(self._ids))
        self._live.add(matcher.matcher_id)
        weakref.finalize(matcher, self._forget, matcher.matcher_id)
        return matcher

    def poll(self) -> None:
        """Find out whether it is still `compiling`; does not wait."""
        try:
            while self.compiling and self.connection.poll():
                reason = self.connection.recv_bytes().decode()
                self.compiling = not self._started
                self._started, self._host.failed_starts = True, 0
                if reason:
                    self._fail(f"is not usable: {reason}")
        except (EOFError, OSError):
            self.compiling = False
            if self._started:
                self._fail(TOO_MUCH)
            else:
                self._host.discard(self._control)
                self._fail(NOT_STARTED, retry_after_s=0.0)

    def ask(self, rows: list[RowState]) -> None:
        """Ask for masks; `collect` waits for them."""
        ended, self._ended = self._ended, []
        self._memory.grow(len(rows))
        self._send(MaskRequest(rows, ended))

    def collect(self, masks: np.ndarray) -> Sequence[int]:
        """Receive what was asked for.

        Args:
            masks: int32 [rows, words]; filled.

        Returns:
            A `RowStatus` for each row; all are rejected, and `error` is set, when the process has
            ended.
        """
        try:
            if self.error is None:
                statuses = self.connection.recv_bytes()
                masks[:] = self._memory.rows(len(masks))
                return statuses
        except (EOFError, OSError):  # it has ended, or the time is over
            self._fail(TOO_SLOW)
        return [RowStatus.REJECTED] * len(masks)

    def close(self) -> None:
        """End its process, now if it is idle."""
        self.connection.close()

    def _fail(self, error: str, retry_after_s: float = RETRY_AFTER_S) -> None:
        self.error = error
        self._retry_at = time.monotonic() + retry_after_s
        self.close()

    def _send(self, message: GrammarSource | MaskRequest) -> None:
        with contextlib.suppress(OSError):  # the process has ended, and `poll` or `collect` tells
            self.connection.send_bytes(encode(message))

    def _forget(self, matcher_id: int) -> None:
        self._live.discard(matcher_id)
        self._ended.append(matcher_id)
