"""Result files: what they hold, and the tables made from them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
"""Where result files are kept; documents may only cite figures that stand here."""

Record = dict[str, Any]


def summarise(lines: Iterable[Record]) -> list[Record]:
    """Join the measurements of one engine and workload, and add medians.

    Each of `lines` has `engine`, `workload`, and what `benchmarks.worker.measure` returns.
    Medians are in tokens a second: `output_tok_s` counts the whole run, prefill included;
    `prefill_tok_s` counts prompt tokens in the run that stops at the first token (which a workload
    with one token of output is itself); `decode_tok_s` is the difference of both.
    """
    grouped: dict[tuple[str, str], list[Record]] = {}
    for line in lines:
        grouped.setdefault((line["engine"], line["workload"]), []).append(line)
    return [_join(group) for group in grouped.values()]


def _join(group: list[Record]) -> Record:
    first = group[0]
    same = ("engine", "workload", "requests", "input_tokens", "output_tokens")
    prefills = [line["prefill_seconds"] for line in group if line["prefill_seconds"] is not None]
    record: Record = {key: first[key] for key in same} | {
        "seeds": [line["seed"] for line in group],
        "seconds": [round(line["seconds"], 4) for line in group],
        "prefill_seconds": [round(seconds, 4) for seconds in prefills],
        "disturbance": [round(line["disturbance"], 3) for line in group],
        "digests": [line["digests"] for line in group],
        "median": _speeds(first, [line["seconds"] for line in group], prefills),
    }
    for key in ("latency", "gpu_memory"):
        if first.get(key):
            record[key] = [line[key] for line in group]
    if first.get("profile"):
        record["profile"] = first["profile"]
    return record


def _speeds(line: Record, totals: list[float], prefills: list[float]) -> dict[str, float | None]:
    """Tokens a second by the median of the runs' seconds."""
    total = statistics.median(totals)
    decoded = line["output_tokens"] - line["requests"]
    prefills = prefills or ([] if decoded else totals)
    prefill = statistics.median(prefills) if prefills else total
    return {
        "output_tok_s": round(line["output_tokens"] / total, 1),
        "prefill_tok_s": round(line["input_tokens"] / prefill, 1) if prefills else None,
        "decode_tok_s": round(decoded / (total - prefill), 1) if total > prefill else None,
    }


def compare(documents: Iterable[dict[str, Any]], engine: str) -> str:
    """A Markdown table of every result, with `engine`'s speed relative to each other engine.

    `same output` counts the requests whose tokens equal those that `engine` gave them;
    `disturbance` is the most CPU time that others took in any of the runs.
    """
    rows = [
        "| workload | engine | output tok/s | prefill tok/s | decode tok/s "
        f"| {engine} is | same output | disturbance |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for document in documents:
        records = document["records"]
        ours = {r["workload"]: r for r in records if r["engine"] == engine}
        rows += [_row(record, ours.get(record["workload"])) for record in records]
    return "\n".join(rows)


def _row(record: Record, ours: Record | None) -> str:
    median = record["median"]
    ratio = same = ""
    if ours is not None and ours is not record:
        ratio = f"{ours['median']['output_tok_s'] / median['output_tok_s']:.2f} x"
        same = _count_same(record, ours)
    speeds = " | ".join(
        f"{median[key]:,.1f}" if median[key] is not None else "-"
        for key in ("output_tok_s", "prefill_tok_s", "decode_tok_s")
    )
    disturbed = f"{max(record['disturbance']):.0%}"
    names = f"{record['workload']} | {record['engine']}"
    return f"| {names} | {speeds} | {ratio} | {same} | {disturbed} |"


def _count_same(record: Record, ours: Record) -> str:
    theirs = dict(zip(record["seeds"], record["digests"], strict=True))
    mine = dict(zip(ours["seeds"], ours["digests"], strict=True))
    pairs = [
        pair
        for seed in theirs.keys() & mine.keys()
        for pair in zip(theirs[seed], mine[seed], strict=True)
    ]
    return f"{sum(a == b for a, b in pairs)} of {len(pairs)}"


def write(document: dict[str, Any], path: Path) -> None:
    """Write one result file, a record a line so that changes are readable."""
    records = ",\n    ".join(json.dumps(record) for record in document["records"])
    whole = json.dumps(document | {"records": []}, indent=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(whole.replace('"records": []', f'"records": [\n    {records}\n  ]') + "\n")


def read(path: Path) -> dict[str, Any]:
    """Read one result file."""
    document: dict[str, Any] = json.loads(path.read_text())
    return document
