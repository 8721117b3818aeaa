"""When a fake engine produced which token: written by the engine, read beside its clients.

A text file an engine, a line a step: the time at which the step was due, as `time.monotonic()` of
the machine, then an entry for each request that joined in this step. From then on the request gets
one token a step, so that the line tells of every later token as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path


class JournalWriter:
    """Appends to the journal of one engine; each line is written at once, by one system call."""

    def __init__(self, folder: Path) -> None:
        path = folder / f"engine-{os.getpid()}.journal"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, due: float, joined: Iterable[tuple[str, int]]) -> None:
        """Note a step, and (request id, output tokens that it had before) of those that joined."""
        entries = "".join(f" {request_id}:{position}" for request_id, position in joined)
        os.write(self._file, f"{due:.6f}{entries}\n".encode())


class Journal:
    """What all fake engines of a server wrote into a folder."""

    def __init__(self, folder: Path) -> None:
        self._engines = [_read(path) for path in sorted(folder.glob("*.journal"))]

    def times(self, request_id: str, count: int) -> list[float] | None:
        """Times at which the request's first `count` tokens were due.

        None where no engine knows them all; the last engine that produced a token counts.
        """
        found: dict[int, float] = {}
        for dues, joined in self._engines:
            step, position = joined.get(request_id, (len(dues), 0))
            found |= dict(enumerate(dues[step : step + count - position], position))
        times = [found[i] for i in range(count) if i in found]
        return times if len(times) == count else None

    def steps(self, begin: float, end: float) -> list[float]:
        """Seconds between successive steps of an engine that were due from `begin` to `end`."""
        gaps = []
        for dues, _ in self._engines:
            within = [due for due in dues if begin <= due <= end]
            gaps += [after - before for before, after in pairwise(within)]
        return gaps


def _read(path: Path) -> tuple[list[float], dict[str, tuple[int, int]]]:
    """Due time of each step, and request id → (step that it joined in, position of its token)."""
    dues: list[float] = []
    joined: dict[str, tuple[int, int]] = {}
    for step, line in enumerate(path.read_text().splitlines()):
        due, *entries = line.split(" ")
        dues.append(float(due))
        for entry in entries:
            request_id, _, position = entry.rpartition(":")
            joined[request_id] = (step, int(position))
    return dues, joined
