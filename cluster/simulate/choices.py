"""What it costs the real load table to choose one of so many engines."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from deployments.load_table import LoadTable
from deployments.placement import AFFINITY_MARGIN, POLICIES, Booking
from engine.outputs import EngineLoad

_TIMED_S = 0.5
_LEAST = 5
_BLOCKS = 8
"""Of a request."""


def measure(sizes: Sequence[int], seed: int) -> Iterator[dict[str, Any]]:
    """Microseconds of booking and releasing a request, for each policy and number of engines.

    Args:
        sizes: numbers of engines.
        seed: of loads and prompts.
    """
    for policy in POLICIES:
        for size in sizes:
            yield {
                "policy": policy,
                "engines": size,
                "choice_us": round(_choice_s(policy, size, random.Random(seed)) * 1e6, 1),
            }


def _choice_s(policy: str, size: int, rng: random.Random) -> float:
    table, limits = _loaded_table(size, rng)
    chosen_by = POLICIES[policy](AFFINITY_MARGIN)
    done, began = 0, time.thread_time()
    while (spent := time.thread_time() - began) < _TIMED_S or done < _LEAST:
        blocks = [b"%d/%d" % (rng.randrange(4 * size), i) for i in range(_BLOCKS)]
        table.book(limits, Booking(str(done), 1200, blocks), chosen_by)
        table.release(str(done), blocks)
        done += 1
    return spent / done


def _loaded_table(size: int, rng: random.Random) -> tuple[LoadTable, dict[str, int]]:
    table, names = LoadTable(), [f"e{i}" for i in range(size)]
    table.set_members("model", names)
    for name in names:
        running = rng.randrange(32)
        load = EngineLoad(running, free_blocks=8000, total_blocks=8192, block_size=128)
        table.report(name, load)
    return table, dict.fromkeys(names, 512)


def table(records: Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table, a line a measurement."""
    lines = ["| policy | engines | µs a choice |", "|---|---:|---:|"]
    lines += [f"| {r['policy']} | {r['engines']:,} | {r['choice_us']:,.1f} |" for r in records]
    return "\n".join(lines)
