"""Normal streams, measured beside clients that might get in their way."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterable
from typing import Any

from benchmarks.machine import read_cpu_seconds
from benchmarks.serving.conversations import Mix
from benchmarks.serving.load import Target, closed_loop
from benchmarks.serving.processes import read_memory
from benchmarks.serving.summary import summarise

Record = dict[str, Any]

_KEPT = ("completed", "errors", "short", "output_tok_s", "ttft_ms", "itl_ms")


def run_streams(target: Target, pid: int, count: int, tokens: int, seed: int) -> Record:
    """Run streams that begin together, each of so many tokens.

    Returns:
        Of `summarise`, what tells how they fared; the cores that the machine kept busy meanwhile;
        and the memory of the server's front in MiB, before and after.

    Args:
        target: the server.
        pid: its process.
        count: streams.
        tokens: of each answer; prompts have about 100.
        seed: of the prompts.
    """
    mix = Mix((80, 120), (tokens, tokens))
    memory, busy, begin = read_memory(pid), read_cpu_seconds()[0], time.monotonic()
    load = asyncio.run(closed_loop(target, mix.draw(seed), count, count))
    seconds, after = time.monotonic() - begin, read_memory(pid)
    busy = read_cpu_seconds()[0] - busy
    result = summarise(load.read())
    return {
        **{name: result[name] for name in _KEPT},
        "machine_busy": round(busy / seconds, 2),
        "ingress_mib": [round(each["ingress"], 2) for each in (memory, after)],
        "haproxy_mib": [round(each["haproxy"], 2) for each in (memory, after)],
    }


def median_itl(runs: Iterable[Record], key: str) -> dict[str, dict[str, float]]:
    """Medians over runs with the same `key` of the ITL's percentiles, in ms."""
    groups: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        groups.setdefault(str(run[key]), []).append(run["itl_ms"])
    return {
        name: {rank: round(statistics.median(itl[rank] for itl in each), 2) for rank in each[0]}
        for name, each in groups.items()
    }
