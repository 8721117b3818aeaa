"""Leaves no process behind: adopts orphaned descendants and ends them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

GRACE_S = 5.0
"""How long a process may take to end after a signal."""
_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, instead of process 1.

    Ray puts its processes into sessions of their own and renames them, so that neither a process
    group nor their environment tells whose they are; their ancestry does. Linux only.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants(patience_s: float) -> None:
    """End what this process has started and adopted: wait, then ask, then force."""
    if _gone_within(patience_s):
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in _descendants():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if _gone_within(GRACE_S):
            return


def _gone_within(seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while _descendants():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _descendants() -> list[int]:
    """Living descendants, after collecting the dead."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    children: dict[int, list[int]] = {}
    for pid, parent in _parents():
        children.setdefault(parent, []).append(pid)
    found, queue = [], [os.getpid()]
    while queue:
        mine = children.get(queue.pop(), [])
        found += mine
        queue += mine
    return found


def _parents() -> list[tuple[int, int]]:
    """(process, parent) of every process that is no zombie."""
    pairs = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
            if state != "Z":
                pairs.append((int(entry.name), int(parent)))
    return pairs
