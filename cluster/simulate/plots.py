"""Plots of simulated policies. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from benchmarks.plots import STYLE, save


def plot_policies(document: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Draw, for each trace, first tokens, cost and cache hits by rate, one colour a policy.

    Args:
        document: what `cluster.simulate run` wrote.
        folder: where to put the files.
        stem: their name.

    Returns:
        The files.
    """
    return _plot(document, _draw_trace, [1, 1, 1], folder, stem)


def plot_rules(document: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Draw, for each trace, engines by time, and late requests by cost, one colour a rule.

    Args:
        document: what `cluster.simulate scale` wrote.
        folder: where to put the files.
        stem: their name.

    Returns:
        The files.
    """
    return _plot(document, _draw_rules, [2, 1], folder, stem)


def _plot(
    document: dict[str, Any],
    draw: Callable[[Sequence[dict[str, Any]], Sequence[Axes]], None],
    widths: Sequence[float],
    folder: Path,
    stem: str,
) -> list[Path]:
    """A row of axes of these widths for each trace, drawn from the trace's records."""
    records = document["records"]
    traces = list(dict.fromkeys(record["trace"] for record in records))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(15, 4 * len(traces)), layout="constrained")
        rows = figure.subplots(len(traces), len(widths), squeeze=False, width_ratios=widths)
        for trace, row in zip(traces, rows, strict=True):
            draw([record for record in records if record["trace"] == trace], row)
        return save(figure, folder, stem)


def _draw_rules(records: Sequence[dict[str, Any]], row: Sequence[Axes]) -> None:
    sizes, costs = row
    for index, record in enumerate(records):
        _draw_rule(record, f"C{index}", sizes, costs)
    sizes.set_title(records[0]["trace"], loc="left")
    _label(sizes, "minutes", "engines in service")
    _label(costs, "engine hours", "late requests (%)")


def _draw_rule(record: dict[str, Any], colour: str, sizes: Axes, costs: Axes) -> None:
    end = (record["simulated_s"], record["sizes"][-1][1])
    times, counts = zip(*record["sizes"], end, strict=True)
    minutes = [when / 60 for when in times]
    sizes.step(minutes, counts, where="post", color=colour, label=record["rule"])
    costs.plot(
        record["engine_hours"], record["late"] * 100, "o", color=colour, label=record["rule"]
    )


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)


def _draw_trace(records: Sequence[dict[str, Any]], row: Sequence[Axes]) -> None:
    times, costs, hits = row
    for index, policy in enumerate(dict.fromkeys(record["policy"] for record in records)):
        line = sorted((r for r in records if r["policy"] == policy), key=lambda r: r["rate"])
        rates, colour = [record["rate"] for record in line], f"C{index}"
        for rank, style in (("p50", "o-"), ("p95", "^--")):
            ttft = [record["ttft_ms"][rank] for record in line]
            times.plot(rates, ttft, style, color=colour, label=f"{policy}, {rank}")
        costs.plot(rates, [r["busy_s_per_mtok"] for r in line], "o-", color=colour, label=policy)
        hits.plot(rates, [r["cache_hits"] for r in line], "o-", color=colour, label=policy)
    times.set_yscale("log")
    for set_formatter in (times.yaxis.set_major_formatter, times.yaxis.set_minor_formatter):
        set_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    costs.set_ylim(bottom=0)
    hits.yaxis.set_major_formatter(PercentFormatter(1.0))
    hits.set_ylim(-0.05, 1.05)
    labels = ("time to first token (ms)", "seconds of work / million tokens", "cache hits")
    for axes, label in zip(row, labels, strict=True):
        axes.set_ylabel(label)
        axes.set_xlabel("requests a second and engine")
        axes.legend(frameon=False, fontsize=9)
    times.set_title(f"{records[0]['trace']} · {records[0]['engines']:,} engines", loc="left")
