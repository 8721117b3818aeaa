"""Plots of result files for the documents. Needs matplotlib, as does `benchmarks.serving.plots`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, PercentFormatter

STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e0e0e0",
    "axes.axisbelow": True,
    "svg.hashsalt": "trunkline",  # the same figures give the same file
}
"""Of all plots, for `matplotlib.rc_context`."""
_MARKERS = "osD^vP*X"


def plot_sweep(document: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Draw step time by batch size, and its share of the roofline, one line a context length.

    Args:
        document: what `benchmarks.sweep run` wrote.
        folder: where to put `<stem>-step-time` and `<stem>-roofline`, each as PNG and SVG.
        stem: start of the files' names.

    Returns:
        The files.
    """
    with mpl.rc_context(STYLE):
        times, shares = _figure(document, "step-time"), _figure(document, "roofline")
        _draw_times(times.axes[0], document["records"])
        _draw_shares(shares.axes[0], document["records"])
        files = save(times, folder, f"{stem}-step-time")
        return files + save(shares, folder, f"{stem}-roofline")


def _figure(document: dict[str, Any], kind: str) -> Figure:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({record["batch"] for record in document["records"]}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("batch size (requests)")
    gpus = document["machine"].get("gpus") or []
    device = gpus[0].partition(",")[0] if gpus else document["machine"].get("cpu", "")
    what = "Decode step" if kind == "step-time" else "Decode step beside its roofline"
    name = Path(document["model"]).name
    axes.set_title(f"{what} · {name}, {document['dtype']} · {device}", loc="left", fontsize=12)
    return figure


def _draw_times(axes: Axes, records: list[dict[str, Any]]) -> None:
    axes.set_yscale("log")
    axes.set_ylabel("time of a step (ms)")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(_label_halves))
    axes.tick_params(axis="y", which="minor", labelsize=9)
    for context, line, style in _lines(records):
        batches = [record["batch"] for record in line]
        measured = [record["step_s"] * 1e3 for record in line]
        axes.plot(batches, measured, label=f"{context:,} tokens of context", **style)
        floors = [record["floor_s"] * 1e3 for record in line]
        axes.plot(batches, floors, linestyle="--", linewidth=1.2, color=style["color"])
    floor = Line2D([], [], linestyle="--", color="gray", label="roofline floor")
    handles, _ = axes.get_legend_handles_labels()
    axes.legend(handles=[*reversed(handles), floor], frameon=False, loc="upper left")


def _draw_shares(axes: Axes, records: list[dict[str, Any]]) -> None:
    axes.set_ylabel("floor ÷ measured")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(0, 1.05)
    axes.axhline(1.0, color="gray", linestyle="--", linewidth=1.2)
    for context, line, style in _lines(records):
        batches = [record["batch"] for record in line]
        shares = [record["roofline_share"] for record in line]
        axes.plot(batches, shares, label=f"{context:,} tokens of context", **style)
    handles, _ = axes.get_legend_handles_labels()
    axes.legend(handles=handles[::-1], frameon=False, loc="best")


def _lines(
    records: list[dict[str, Any]],
) -> Iterable[tuple[int, list[dict[str, Any]], dict[str, Any]]]:
    """For each context length its records by batch size, and colour and marker of its line."""
    contexts = sorted({record["context"] for record in records})
    colours = mpl.colormaps["viridis"]
    for index, context in enumerate(contexts):
        line = sorted((r for r in records if r["context"] == context), key=lambda r: r["batch"])
        colour = colours(0.85 * index / max(len(contexts) - 1, 1))
        marker = _MARKERS[index % len(_MARKERS)]
        yield context, line, {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.8}


def _label_halves(value: float, _: int | None) -> str:
    """Minor ticks of a log axis are labelled at 2 and 5 only."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


def save(figure: Figure, folder: Path, stem: str) -> list[Path]:
    """Write a figure as `<stem>.png` and `<stem>.svg`, and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{stem}.png", folder / f"{stem}.svg"]
    figure.savefig(files[0], dpi=160)
    figure.savefig(files[1], metadata={"Date": None})
    return files
