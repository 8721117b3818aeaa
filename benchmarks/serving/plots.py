"""Plots of serving results: speed and latencies by load, one colour a result file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.plots import STYLE, save

_PANELS = (
    ("output_tok_s", "output tokens a second"),
    ("ttft_ms", "time to first token (ms)"),
    ("itl_ms", "time between events (ms)"),
    ("delay_ms", "delay from the engine's step (ms)"),
)
_X_LABELS = {"clients": "clients (closed loop)", "rate": "arrivals a second (open loop)"}


def plot_serving(documents: Mapping[str, dict[str, Any]], folder: Path) -> list[Path]:
    """Draw result files into one figure: speed, and p50 and p99 of latencies, by load.

    Args:
        documents: label → what `benchmarks.serving run` wrote; all of one kind of load.
        folder: where to put the files, named after the labels.

    Returns:
        The files.

    Raises:
        ValueError: some are by clients and others by rate.
    """
    records = [record for document in documents.values() for record in document["records"]]
    kinds = {kind for kind in _X_LABELS for record in records if kind in record}
    if len(kinds) != 1:
        raise ValueError("plot result files by clients and those by rate apart from each other")
    kind = kinds.pop()
    panels = [(key, label) for key, label in _PANELS if any(record.get(key) for record in records)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 4 * ((len(panels) + 1) // 2)), layout="constrained")
        for index, (key, label) in enumerate(panels, 1):
            axes = figure.add_subplot((len(panels) + 1) // 2, 2, index)
            _prepare(axes, _X_LABELS[kind], label, sorted({record[kind] for record in records}))
            for number, (name, document) in enumerate(documents.items()):
                _draw(axes, document["records"], kind, key, name, f"C{number}")
            axes.legend(frameon=False)
        return save(figure, folder, "-".join(documents))


def _prepare(axes: Axes, x_label: str, y_label: str, ticks: list[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)


def _draw(
    axes: Axes, records: list[dict[str, Any]], kind: str, key: str, name: str, colour: str
) -> None:
    """One line of speeds, or two of percentiles."""
    known = [record for record in records if record.get(key)]
    loads = [record[kind] for record in known]
    if key == "output_tok_s":
        axes.plot(loads, [record[key] for record in known], "o-", color=colour, label=name)
        return
    for rank, style in (("p50", "o-"), ("p99", "^--")):
        values = [record[key][rank] for record in known]
        axes.plot(loads, values, style, color=colour, label=f"{name}, {rank}")


def plot_load_step(document: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Draw load, engines with the decisions for them, and times to the first token, by time.

    Args:
        document: what `benchmarks.serving.load_step run` wrote.
        folder: where to put the files.
        stem: their name.

    Returns:
        The files.
    """
    (record,) = document["records"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 9), layout="constrained")
        load, engines, ttft = figure.subplots(3, 1, sharex=True)
        end = _draw_phases(load, record["phases"])
        times, sizes = zip(*record["sizes"], (end, record["sizes"][-1][1]), strict=True)
        engines.step(times, sizes, where="post", label="in service")
        wanted = [(0.0, sizes[0]), *((d["at_s"], d["to"]) for d in record["decisions"])]
        times, sizes = zip(*wanted, (end, wanted[-1][1]), strict=True)
        engines.step(times, sizes, where="post", linestyle="--", label="decided")
        engines.set_ylabel("engines")
        times, seconds = zip(*record["ttft_p95_s"], strict=True)
        ttft.plot(times, seconds, "o-", markersize=4, label="95th percentile, by arrival")
        ttft.axhline(document["target_ttft_s"], color="gray", linestyle="--", label="target")
        ttft.set_ylabel("time to first token (s)")
        ttft.set_xlabel("seconds")
        for axes in (load, engines, ttft):
            axes.set_ylim(bottom=0)
            axes.legend(frameon=False)
        return save(figure, folder, stem)


def _draw_phases(axes: Axes, phases: list[tuple[float, float]]) -> float:
    """Draw the rate of arrivals; returns when the last phase ends."""
    times, rates = [0.0], []
    for seconds, rate in phases:
        times.append(times[-1] + seconds)
        rates.append(rate)
    axes.step(times, [*rates, rates[-1]], where="post", label="arrivals")
    axes.set_ylabel("requests a second")
    return times[-1]
