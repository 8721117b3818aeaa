"""Results beside this project's goals, and beside figures of peers that were measured elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

REFERENCE = Path(__file__).parent / "reference" / "design-part-6.json"
"""Figures on one type of GPU, by model and workload, with where they come from."""

_HEAD = "| {gpu}, {model} | {engine} | vLLM 0.24 | goal | of vLLM | of goal | limit |"


def goal_table(document: dict[str, Any], engine: str, reference: Path = REFERENCE) -> str:
    """A Markdown table of `engine`'s results beside the reference figures.

    Empty when `reference` has none for the document's model and GPU. Figures are output tok/s,
    where a row says nothing else.
    """
    known = json.loads(reference.read_text())
    model = Path(document.get("model", "")).name
    gpus = document["machine"].get("gpus") or [""]
    ours = {r["workload"]: r["median"] for r in document["records"] if r["engine"] == engine}
    if model not in known["models"] or known["gpu"] not in gpus[0]:
        return ""
    rows = [
        _row(_title(name, figures), ours[name][figures["metric"]], figures)
        for name, figures in known["models"][model]["workloads"].items()
        if name in ours
    ]
    started = document["engines"].get(engine, {}).get("first_token_seconds")
    if started:
        figures = known["models"][model]["first_token_seconds"]
        rows.append(_row("start to first token (s)", round(started, 1), figures))
    head = _HEAD.format(gpu=known["gpu"], model=model, engine=engine)
    return "\n".join([head, "|---|" + "---:|" * 6, *rows]) if rows else ""


def _title(workload: str, figures: dict[str, Any]) -> str:
    return f"{workload} (input tok/s)" if figures["metric"] == "prefill_tok_s" else workload


def _row(title: str, value: float, figures: dict[str, Any]) -> str:
    ratios = " | ".join(f"{value / figures[key]:.2f}" for key in ("vllm", "goal"))
    limit = f"{figures['limit']:,}" if "limit" in figures else "-"
    return (
        f"| {title} | {value:,} | {figures['vllm']:,} | {figures['goal']:,} | {ratios} | {limit} |"
    )
