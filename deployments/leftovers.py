"""Ends what a server has left behind: processes that carry its mark in their environment."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

_MARK = "TRUNKLINE_SERVER"

GRACE_S = 5.0
"""How long a process may take to end after a signal."""


def marked(folder: Path) -> dict[str, str]:
    """Environment variable that all processes of the server inherit; `folder` is its own."""
    return {_MARK: str(folder)}


def end_leftovers(folder: Path, patience_s: float) -> None:
    """End the processes that the server's own shutdown has not, by force after a while.

    Ray puts its processes into sessions of their own, so no process group holds them all. Only
    Linux says what is in the environment of a process; elsewhere this does nothing.
    """
    if _gone_within(folder, patience_s):
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in _find(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if _gone_within(folder, GRACE_S):
            return


def _gone_within(folder: Path, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(_find(folder)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _find(folder: Path) -> Iterator[int]:
    mark = f"{_MARK}={folder}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            own = mark in (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # gone, or somebody else's
            continue
        if own and int(entry.name) != os.getpid():
            yield int(entry.name)
