"""What the autoscaling policy does with a day and with a step, beside Serve's own and none."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from cluster.autoscaling import Decision, Goals, Observation, State, decide
from cluster.simulate.cell import Cell, CellSettings, ChooseSize, Sizing
from cluster.simulate.engine import EngineShape
from cluster.simulate.ingress import Wires
from cluster.simulate.serve_rule import ByRequests
from cluster.simulate.traces import TRACES, Day, Steps, Trace

_USUAL = Goals()
PERIODS = 2
"""Days, or steps up and down, of a run."""


class ByLoad:
    """`cluster.autoscaling` itself."""

    def __init__(self, goals: Goals) -> None:
        self._goals = goals
        self._state = State()
        self.decisions: list[tuple[float, Decision]] = []
        """Those that changed something."""

    def __call__(self, seen: Observation, now: float) -> int:
        """See `ChooseSize`."""
        decision, self._state = decide(self._goals, self._state, seen, now)
        if decision.target != seen.target:
            self.decisions.append((now, decision))
        return decision.target


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `cluster.simulate scale`."""
    parser.add_argument("--most", type=int, default=16, help="engines")
    parser.add_argument(
        "--rate", type=float, default=15.0, help="mean requests a second, for each of the most"
    )
    parser.add_argument("--period-s", type=float, default=3600.0, help="of a day, or up and down")
    parser.add_argument("--start-up-s", type=float, default=60.0, help="of an engine")
    parser.add_argument("--upscale-delay-s", type=float, default=_USUAL.upscale_delay_s)
    parser.add_argument("--downscale-delay-s", type=float, default=_USUAL.downscale_delay_s)
    parser.add_argument("--target-ttft-s", type=float, default=1.0)
    parser.add_argument(
        "--ongoing", type=float, nargs="+", default=[32, 64, 128], help="for Serve's own rule"
    )


def measure(options: argparse.Namespace, shape: EngineShape) -> Iterator[dict[str, Any]]:
    """Run each trace under each rule.

    Args:
        options: of `cluster.simulate scale`.
        shape: of the engines.
    """
    for name, trace in _traces(options.period_s).items():
        for rule, make in _rules(options).items():
            began = time.monotonic()
            record = _run(options, shape, trace, make)
            print(f"{name}, {rule}: {time.monotonic() - began:.0f} s", file=sys.stderr)
            yield {"trace": name, "rule": rule, **record}


def _traces(period_s: float) -> dict[str, Trace]:
    base = TRACES["poisson"]
    return {
        "day": replace(base, arrivals=Day(period_s)),
        "step": replace(base, arrivals=Steps(period_s / 2, period_s / 2)),
    }


def _rules(options: argparse.Namespace) -> dict[str, Callable[[], ChooseSize] | None]:
    """Name → what makes the rule; None keeps the most engines."""
    up, down = options.upscale_delay_s, options.downscale_delay_s
    goals = Goals(target_ttft_s=options.target_ttft_s, upscale_delay_s=up, downscale_delay_s=down)
    by_requests = {
        f"{ongoing:g} requests": partial(ByRequests, ongoing, up, down)
        for ongoing in options.ongoing
    }
    return {"by load": partial(ByLoad, goals), **by_requests, "fixed": None}


def _run(
    options: argparse.Namespace,
    shape: EngineShape,
    trace: Trace,
    make: Callable[[], ChooseSize] | None,
) -> dict[str, Any]:
    rate = options.rate * options.most
    sizing = make and Sizing(make, 1, options.most, start_up_s=options.start_up_s)
    wires = Wires(options.to_engine_ms / 1e3, options.from_engine_ms / 1e3)
    first = _first_size(options, trace) if make else options.most
    settings = CellSettings(shape, first, 1, "prefix_load", wires, sizing)
    requests = round(rate * PERIODS * options.period_s)
    cell = Cell(settings, trace.chats(0, requests, rate, options.seed, 32768), options.seed)
    tally = cell.run()
    late = 1 - tally.ttft.share_within(options.target_ttft_s)
    return {
        "rate": rate,
        **tally.record(),
        "late": round(late, 5),
        "engine_hours": round(sum(engine.service_s for engine in tally.engines) / 3600, 3),
        "sizes": [(round(when, 1), size) for when, size in cell.sizes],
    }


def _first_size(options: argparse.Namespace, trace: Trace) -> int:
    """Engines for the rate with which the trace begins: nothing has been learnt before."""
    assert isinstance(trace.arrivals, Day | Steps)
    level = trace.arrivals.level(0.0)
    return max(1, math.ceil(level * int(options.most) / 2))


def table(records: Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table, a line a run; times in ms."""
    heads = ["trace", "rule", "requests", "TTFT p50", "p95", "p99", "late", "engine hours", "sizes"]
    lines = [heads, ["---", "---", *["---:"] * (len(heads) - 2)], *map(_cells, records)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(record: Mapping[str, Any]) -> list[str]:
    ttft = record["ttft_ms"]
    return [
        record["trace"],
        record["rule"],
        f"{record['requests']:,}",
        *(f"{ttft[rank]:,.1f}" for rank in ("p50", "p95", "p99")),
        f"{record['late']:.2%}",
        f"{record['engine_hours']:.1f}",
        str(len(record["sizes"])),
    ]
