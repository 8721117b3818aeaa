"""How the memory of a server's processes goes on while they live."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BASELINE = 3
"""Growth counts from a process's sample of this number: by then its caches are full."""
SAMPLES = 6
"""A process with fewer tells nothing."""
SHARE = 0.1
"""Memory counts as flat that grows by less than this share of itself, or than `MIB`."""
MIB = 10.0


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
            first, last = samples[BASELINE - 1], samples[-1]
            found = {
                "mib": [round(each, 1) for each in samples],
                "growth": round(last / first - 1, 4),
                "flat": last - first < max(SHARE * first, MIB),
            }
            role = self._roles[pid]
            if role not in worst or _badness(found) > _badness(worst[role]):
                worst[role] = found
        return worst


def _badness(found: Mapping[str, Any]) -> tuple[bool, float]:
    """Ranks processes: a small one may grow by a large share and be flat all the same."""
    return not found["flat"], found["growth"]
