"""What a fake engine did in each step: written by the engine, read beside its clients.

A text file an engine, a line a step: the time at which the step was due, as `time.monotonic()` of
the machine; the CPU seconds that the engine's thread had spent by then; an entry for each request
that was given a row, with its prompt tokens and how many of them the cache had; and an entry for
each that got a token now and none in the step before, with what number the token has. From then on
a request gets one token a step, so that the line tells of every later token as well.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple


class Admission(NamedTuple):
    """A request that an engine gave a row; it happens again when the request was preempted."""

    request_id: str
    prompt_tokens: int
    cached_tokens: int
    """Of the prompt."""


class JournalWriter:
    """Appends to the journal of one engine; each line is written at once, by one system call."""

    def __init__(self, folder: Path) -> None:
        path = folder / f"engine-{os.getpid()}.journal"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(
        self,
        due: float,
        cpu_s: float,
        joined: Iterable[tuple[str, int]],
        admitted: Iterable[Admission] = (),
    ) -> None:
        """Note a step.

        Args:
            due: when its tokens were due, in seconds of `time.monotonic()`.
            cpu_s: CPU seconds of the engine's thread so far.
            joined: request id and number of the token, where the step before gave none.
            admitted: requests that were given rows.
        """
        entries = [f"{due:.6f}", f"{cpu_s:.6f}"]
        entries += [f"+{i}:{prompt}:{cached}" for i, prompt, cached in admitted]
        entries += [f"{request_id}:{position}" for request_id, position in joined]
        os.write(self._file, f"{' '.join(entries)}\n".encode())


@dataclass(slots=True)
class EngineJournal:
    """What one engine wrote."""

    dues: list[float] = field(default_factory=list)
    """When each step was due."""
    cpu_s: list[float] = field(default_factory=list)
    """CPU seconds of the engine's thread by then."""
    admissions: dict[str, list[Admission]] = field(default_factory=dict)
    """By request; all but the first followed preemptions."""
    joined: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """By request: from which step on it got tokens, and the number of the first of them."""

    @classmethod
    def read(cls, path: Path) -> EngineJournal:
        """Read a file, which may still grow."""
        journal = cls()
        for step, line in enumerate(path.read_text().splitlines()):
            due, cpu_s, *entries = line.split(" ")
            journal.dues.append(float(due))
            journal.cpu_s.append(float(cpu_s))
            for entry in entries:
                journal._note(step, entry)
        return journal

    def _note(self, step: int, entry: str) -> None:
        rest, _, last = entry.rpartition(":")
        if not entry.startswith("+"):
            self.joined.setdefault(rest, []).append((step, int(last)))
            return
        request_id, _, prompt = rest[1:].rpartition(":")
        admission = Admission(request_id, int(prompt), int(last))
        self.admissions.setdefault(request_id, []).append(admission)

    def cpu_at(self, when: float) -> float:
        """CPU seconds of the engine's thread by the last step due before `when`."""
        step = bisect_right(self.dues, when)
        return self.cpu_s[step - 1] if step else 0.0


class Journal:
    """What all fake engines of a server wrote into a folder."""

    def __init__(self, folder: Path) -> None:
        self.engines = [EngineJournal.read(path) for path in sorted(folder.glob("*.journal"))]

    def times(self, request_id: str, count: int) -> list[float] | None:
        """Times at which the request's first `count` tokens were due.

        None where no engine knows them all; the last engine that produced a token counts.
        """
        found: dict[int, float] = {}
        for engine in self.engines:
            for step, position in engine.joined.get(request_id, ()):
                found |= dict(enumerate(engine.dues[step : step + count - position], position))
        times = [found[i] for i in range(count) if i in found]
        return times if len(times) == count else None

    def steps(self, begin: float, end: float) -> list[float]:
        """Seconds between successive steps of an engine that were due from `begin` to `end`."""
        gaps = []
        for engine in self.engines:
            within = [due for due in engine.dues if begin <= due <= end]
            gaps += [after - before for before, after in pairwise(within)]
        return gaps

    def cpu(self, begin: float, end: float) -> float:
        """CPU seconds that the engines' own threads spent from `begin` to `end`."""
        return sum(engine.cpu_at(end) - engine.cpu_at(begin) for engine in self.engines)
