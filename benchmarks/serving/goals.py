"""The table of `benchmarks.serving.http_table`: loads beside goals, and beside the engine alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REFERENCE = Path(__file__).parents[1] / "reference" / "http-design-part-6.json"
"""Figures on one type of GPU, by model and clients, with where they come from."""
_ROLES = ("ingress", "engine_actor", "engine_replica", "haproxy", "client")
_HEADS = (
    "clients", "requests", "errors", "output tok/s", "goal", "vLLM 0.24",
    "TTFT p50", "goal", "p99", "ITL p50", "p99", "end to end p50", "p99",
    "offline tok/s", "served / offline", *(f"{role} CPU" for role in _ROLES),
)  # fmt: skip


def http_table(document: dict[str, Any], reference: Path = REFERENCE) -> str:
    """A Markdown table, a line a closed loop; times in ms, CPU in µs an output token, where that of
    the engine actor has the whole engine in it.

    Goals are left out where `reference` has none for the document's model and GPU. Offline runs
    without a served one have lines of their own.
    """
    known = _reference_of(document, json.loads(reference.read_text()))
    offline = {each["clients"]: each for each in document["offline"]}
    lines = [
        _line(record, known.get(str(record["clients"]), {}), offline.pop(record["clients"], None))
        for record in document["records"]
    ]
    lines += [
        [str(clients), str(each["requests"]), *["-"] * 11, _number(each["output_tok_s"])]
        + ["-"] * (1 + len(_ROLES))
        for clients, each in offline.items()
    ]
    rows = [_HEADS, ["---:"] * len(_HEADS), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def served_of_offline(record: Mapping[str, Any], offline: Mapping[str, Any]) -> float:
    """Output tokens a second over HTTP as a share of the engine's alone, both over whole runs.

    Raises:
        ValueError: the runs are not of the same requests.
    """
    if record["requests"] != offline["requests"]:
        raise ValueError(
            f"{record['requests']} requests were served and {offline['requests']} run offline; "
            "measure both with the same --requests"
        )
    return float(record["output_tok_s"]) / float(offline["output_tok_s"])


def _reference_of(document: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Figures by clients, empty for another model or GPU."""
    gpus = document["machine"].get("gpus") or [""]
    figures: dict[str, Any] = known["models"].get(document["model"], {})
    return figures if known["gpu"] in gpus[0] else {}


def _line(record: Any, known: dict[str, Any], offline: Any) -> list[str]:
    goal, vllm = known.get("goal", {}), known.get("vllm", {})
    cpu = record.get("cpu_us_per_token") or {}
    share = "-" if offline is None else f"{served_of_offline(record, offline):.3f}"
    ttft, itl, whole = (record[key] or {} for key in ("ttft_ms", "itl_ms", "e2e_ms"))
    return [
        str(record["clients"]),
        str(record["requests"]),
        str(sum(record["errors"].values()) + record["short"]),
        *map(_number, (record["output_tok_s"], goal.get("output_tok_s"), vllm.get("output_tok_s"))),
        *map(_number, (ttft.get("p50"), goal.get("ttft_p50_ms"), ttft.get("p99"))),
        *map(_number, (itl.get("p50"), itl.get("p99"), whole.get("p50"), whole.get("p99"))),
        _number(offline["output_tok_s"] if offline else None),
        share,
        *(_number(cpu.get(role)) for role in _ROLES),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"
