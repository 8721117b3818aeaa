"""How the memory of a server's processes goes on while they live."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.serving.processes import OTHERS

SAMPLES = 6
"""A process with fewer tells nothing. So many at the end are taken while no process is started."""


@dataclass(frozen=True, slots=True)
class Bound:
    """Memory counts as flat that grows by less than a share of itself, or than some MiB."""

    baseline: int
    """Index of the sample from which on growth counts."""
    share: float
    mib: float

    def judge(self, samples: list[float]) -> dict[str, Any]:
        """What the samples of a process say, in MiB."""
        first, last = samples[self.baseline], samples[-1]
        return {
            "mib": [round(each, 1) for each in samples],
            "growth": round(last / first - 1, 4),
            "flat": last - first < max(self.share * first, self.mib),
        }


OF_PLANE = Bound(baseline=2, share=0.1, mib=10.0)
"""For each process of the serve plane while it lives; by its third sample its caches are full."""
OF_DAEMONS = Bound(baseline=-SAMPLES, share=0.02, mib=2.0)
"""For Ray's own. Its agent keeps the counters of every process that there ever was, under tags of
that process, and so grows with each that is killed and replaced. It must not grow with requests:
that is what the last samples show, between which thousands come and no process is started."""


class MemoryWatch:
    """Samples by process."""

    def __init__(self) -> None:
        self._samples: dict[int, list[float]] = {}
        self._roles: dict[int, str] = {}

    def take(self, processes: Mapping[int, tuple[str, float]]) -> None:
        """Note a sample: process id → role, and MiB."""
        for pid, (role, mib) in processes.items():
            self._roles[pid] = role
            self._samples.setdefault(pid, []).append(mib)

    def summarise(self) -> dict[str, dict[str, Any]]:
        """For each role the process whose memory grew most, and whether that is flat.

        Roles without a process that lived for `SAMPLES` are not there.
        """
        worst: dict[str, dict[str, Any]] = {}
        for pid, samples in self._samples.items():
            if len(samples) < SAMPLES:
                continue
            role = self._roles[pid]
            found = (OF_DAEMONS if role == OTHERS else OF_PLANE).judge(samples)
            if role not in worst or _badness(found) > _badness(worst[role]):
                worst[role] = found
        return worst


def _badness(found: Mapping[str, Any]) -> tuple[bool, float]:
    """Ranks processes: a small one may grow by a large share and be flat all the same."""
    return not found["flat"], found["growth"]
