"""Simulates fleets, compares routing policies on them, and checks itself against a real run.

    python -m cluster.simulate run --engines 64 --requests 200000 --traces chats bursts --rates 5 20
    python -m cluster.simulate run --engines 10000 --requests 10000000 --policies prefix_load
    python -m cluster.simulate scale
    python -m cluster.simulate check
    python -m cluster.simulate choices
    python -m cluster.simulate plot benchmarks/results/FILE

`run` writes one JSON file, as the others do; `scale` compares rules for the number of engines;
`check` has a server with fake engines serve the load that it predicts; `choices` times the real
table over more and more engines; `plot` draws what `run` and `scale` wrote. docs/simulator.md says
how to read them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.machine import describe_run
from cluster.simulate import check, choices, scaling
from cluster.simulate.cell import CellSettings
from cluster.simulate.engine import EngineShape
from cluster.simulate.fleet import FleetSettings, simulate
from cluster.simulate.ingress import Wires
from cluster.simulate.step_time import errors, fit
from cluster.simulate.tally import table
from cluster.simulate.traces import TRACES
from deployments.placement import POLICIES

_SWEEP = results.FOLDER / "sweep-h200-qwen2.5-7b-2026-11-21.json"
_OFFLINE = results.FOLDER / "offline-h200-qwen2.5-7b-2026-11-21.json"
_IMAGES = Path(__file__).parents[2] / "docs" / "images"


def main(words: list[str] | None = None) -> None:
    """Run the command line."""
    options = _parse(words)
    try:
        options.action(options)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"cluster.simulate: {error}")


def run(options: argparse.Namespace) -> None:
    """Simulate every trace at every rate under every policy and write the file."""
    document, out = _begin(options, "simulate")
    shape = _calibrate(options, document)
    document["records"] = list(_runs(options, shape))
    results.write(document, out)
    print(f"{out}\n{table(document['records'])}")


def scale(options: argparse.Namespace) -> None:
    """Simulate rules for the number of engines and write the file."""
    document, out = _begin(options, "simulate-autoscaling")
    shape = _calibrate(options, document)
    document["records"] = list(scaling.measure(options, shape))
    results.write(document, out)
    print(f"{out}\n{scaling.table(document['records'])}")


def _calibrate(options: argparse.Namespace, document: dict[str, Any]) -> EngineShape:
    """The engines that were measured; adds to the document what is known of them."""
    sweep, offline = results.read(options.sweep), results.read(options.offline)
    step_time = fit(sweep, offline, options.max_num_seqs)
    worst = max(map(abs, errors(step_time, sweep, options.max_num_seqs)))
    document["step_time"] = {
        "files": [options.sweep.name, options.offline.name],
        "seconds": {name: getattr(step_time, name) for name in step_time.__slots__},
        "largest_error": round(worst, 4),
    }
    document["seed"] = options.seed
    return EngineShape(
        step_time, options.max_num_seqs, cache_tokens=options.cache_tokens, steps_ahead=1
    )


def _runs(options: argparse.Namespace, shape: EngineShape) -> Iterator[results.Record]:
    wires = Wires(options.to_engine_ms / 1e3, options.from_engine_ms / 1e3)
    for trace, rate, policy in product(options.traces, options.rates, options.policies):
        cell = CellSettings(shape, options.cell, options.ingresses, policy, wires)
        settings = FleetSettings(
            cell,
            TRACES[trace],
            options.engines,
            options.requests,
            rate,
            options.seed,
            options.max_tokens,
        )
        began, spent = time.monotonic(), _cpu_s()
        tally = simulate(settings, options.workers)
        seconds = time.monotonic() - began
        print(f"{trace}, {policy}: {seconds:.1f} s", file=sys.stderr)
        yield {
            "trace": trace,
            "policy": policy,
            "rate": rate,
            "engines": options.engines,
            "cells": settings.num_cells,
            **tally.record(),
            "wall_s": round(seconds, 1),
            "cpu_s": round(_cpu_s() - spent, 1),
        }


def _cpu_s() -> float:
    """CPU seconds of this process and of workers that have ended."""
    return sum(os.times()[:4])


def check_prediction(options: argparse.Namespace) -> None:
    """Predict loads, have them served, and write both."""
    document, out = _begin(options, "simulate-check")
    document |= check.measure(options)
    results.write(document, out)
    print(f"{out}\n{check.table(document['records'])}")


def time_choices(options: argparse.Namespace) -> None:
    """Time the load table and write the file."""
    document, out = _begin(options, "simulate-choices")
    document["records"] = list(choices.measure(options.engines, options.seed))
    results.write(document, out)
    print(f"{out}\n{choices.table(document['records'])}")


def plot(options: argparse.Namespace) -> None:
    """Draw a result file, as PNG and SVG."""
    from cluster.simulate.plots import plot_policies, plot_rules

    document = results.read(options.file)
    draw = plot_rules if "rule" in document["records"][0] else plot_policies
    for file in draw(document, options.images, options.file.stem):
        print(file)


def _begin(options: argparse.Namespace, name: str) -> tuple[dict[str, Any], Path]:
    """The head of a result file, and where it goes."""
    started = datetime.now(UTC)
    out = options.out or results.FOLDER / f"{name}-{started:%Y%m%d-%H%M%S}.json"
    return describe_run("cluster.simulate", options.words, started), out


def _parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="cluster.simulate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(words=sys.argv[1:] if words is None else words)
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run", help="simulate and write a result file")
    running.set_defaults(action=run)
    _add_fleet_options(running)
    _add_engine_options(running)
    checking = commands.add_parser("check", help="compare predictions with a real run")
    checking.set_defaults(action=check_prediction)
    check.add_options(checking)
    timing = commands.add_parser("choices", help="time the choice of an engine")
    timing.set_defaults(action=time_choices)
    timing.add_argument("--engines", type=int, nargs="+", default=[4, 8, 16, 64, 256, 1024, 10_000])
    resizing = commands.add_parser("scale", help="simulate rules for the number of engines")
    resizing.set_defaults(action=scale)
    scaling.add_options(resizing)
    _add_engine_options(resizing)
    for command in (running, checking, timing, resizing):
        command.add_argument("--seed", type=int, default=0, help="of all that is drawn")
        command.add_argument("--out", type=Path, help="file, in benchmarks/results if unset")
    plotting = commands.add_parser("plot", help="draw what `run` or `scale` wrote")
    plotting.set_defaults(action=plot)
    plotting.add_argument("file", type=Path)
    plotting.add_argument("--images", type=Path, default=_IMAGES, help="folder to draw into")
    return parser.parse_args(words)


def _add_fleet_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engines", type=int, default=64)
    parser.add_argument("--cell", type=int, default=8, help="engines that share their ingresses")
    parser.add_argument("--ingresses", type=int, default=1, help="of a cell")
    parser.add_argument("--requests", type=int, default=100_000, help="of each run")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[20.0], help="requests a second and engine"
    )
    parser.add_argument("--traces", nargs="+", choices=tuple(TRACES), default=["poisson"])
    parser.add_argument("--policies", nargs="+", choices=tuple(POLICIES), default=list(POLICIES))
    parser.add_argument("--max-tokens", type=int, default=32768, help="of a chat")
    parser.add_argument("--workers", type=int, default=2, help="processes")


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sweep", type=Path, default=_SWEEP, help="result that steps are from")
    parser.add_argument(
        "--offline", type=Path, default=_OFFLINE, help="result that prefill is from"
    )
    parser.add_argument("--max-num-seqs", type=int, default=256, help="rows of an engine's step")
    parser.add_argument("--cache-tokens", type=int, default=2**20, help="of an engine")
    parser.add_argument("--to-engine-ms", type=float, default=3.0, help="from client to engine")
    parser.add_argument("--from-engine-ms", type=float, default=3.0, help="and back")


if __name__ == "__main__":
    main()
