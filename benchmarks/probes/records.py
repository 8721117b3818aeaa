"""Records of measurements, and the table of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = dict[str, Any]


def record(
    method: str,
    shape: Mapping[str, object],
    microseconds: float,
    *,
    nbytes: float | None = None,
    flops: float | None = None,
    **more: Any,
) -> Record:
    """One measurement.

    Args:
        method: what was called.
        shape: the sizes that it was called with.
        microseconds: median of a call.
        nbytes: bytes that it must move; gives `gb_s`, in 10⁹ bytes a second.
        flops: floating-point operations of a call; gives `tflop_s`, in 10¹² a second.
        more: further entries.
    """
    entry: Record = {"method": method, "shape": dict(shape), "microseconds": round(microseconds, 3)}
    if nbytes is not None:
        entry["gb_s"] = round(nbytes / microseconds / 1e3, 1)
    if flops is not None:
        entry["tflop_s"] = round(flops / microseconds / 1e6, 1)
    return entry | more


def spread_record(method: str, shape: Mapping[str, object], seconds: Sequence[float]) -> Record:
    """Many measurements of one call: the median, the 90th percentile and the least."""
    microseconds = [each * 1e6 for each in seconds]
    tail = statistics.quantiles(microseconds, n=10, method="inclusive")
    return record(
        method,
        shape,
        statistics.median(microseconds),
        p90=round(tail[-1], 1),
        least=round(min(microseconds), 1),
    )


def skipped(method: str, reason: str) -> Record:
    """A measurement that could not be made, and why."""
    return {"method": method, "skipped": reason}


def table(records: Iterable[Record]) -> str:
    """A Markdown table of measurements, each with its probe's `name`."""
    head = "| probe | method | shape | µs | GB/s | TFLOP/s | more |"
    return "\n".join([head, "|---|---|---|---:|---:|---:|---|", *map(_row, records)])


def _row(entry: Record) -> str:
    fixed = ("name", "method", "shape", "microseconds", "gb_s", "tflop_s")
    shape = ", ".join(f"{key} {value}" for key, value in entry.get("shape", {}).items())
    speeds = [f"{entry[key]:,.1f}" if key in entry else "" for key in fixed[3:]]
    more = "; ".join(f"{key} {_tell(entry[key])}" for key in entry if key not in fixed)
    cells = [entry["name"], entry["method"], shape, *speeds, more]
    return f"| {' | '.join(cells)} |"


def _tell(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_tell(part)}" for key, part in value.items()) or "-"
    return f"{value:g}" if isinstance(value, float) else str(value)
