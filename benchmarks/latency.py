"""How long requests took: what a scheduling policy is judged by."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.engines import RequestTimes

_STATISTICS = ("mean", "p50", "p99")


def summarise_times(times: Sequence[RequestTimes]) -> dict[str, dict[str, float]]:
    """Mean, p50 and p99 (nearest rank) over requests, in seconds from their arrival."""
    return {
        "first_token": _spread([each.first_token for each in times]),
        "finished": _spread([each.finished for each in times]),
    }


def _spread(values: Iterable[float]) -> dict[str, float]:
    ordered = sorted(values)
    ranks = {f"p{p}": ordered[math.ceil(len(ordered) * p / 100) - 1] for p in (50, 99)}
    spread = {"mean": statistics.fmean(ordered), **ranks}
    return {name: round(value, 5) for name, value in spread.items()}


def latency_table(records: Iterable[dict[str, Any]]) -> str:
    """A Markdown table of the records that carry `latency`, medians over rounds; else empty."""
    rows = [
        f"| {record['workload']} | {record['engine']} | "
        + " | ".join(
            f"{statistics.median(each[event][name] for each in record['latency']):.3f}"
            for event in ("first_token", "finished")
            for name in _STATISTICS
        )
        + " |"
        for record in records
        if record.get("latency")
    ]
    heads = (f"{event}, {name} (s)" for event in ("first token", "done") for name in _STATISTICS)
    head = f"| workload | engine | {' | '.join(heads)} |"
    return "\n".join([head, "|---|---|" + "---:|" * 6, *rows]) if rows else ""
