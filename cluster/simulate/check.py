"""Predicts what clients of real processes will see, and then looks.

The engines are `benchmarks.serving.fake`'s: their steps take a known time, and all else is what is
shipped. What the plane between client and engine takes is learnt from an idle server first.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from benchmarks.serving.answers import Answer
from benchmarks.serving.conversations import Conversation, Mix, arrivals, count_words
from benchmarks.serving.fake_server import add_fake_option, fake_settings, fake_target, serve_fake
from benchmarks.serving.load import Load, Target, closed_loop, open_loop
from benchmarks.serving.measure import watch
from cluster.simulate.cell import Cell, CellSettings
from cluster.simulate.chats import Chat, Turn
from cluster.simulate.engine import EngineShape
from cluster.simulate.ingress import Wires
from cluster.simulate.step_time import StepTime
from cluster.simulate.tally import Histogram

SETTINGS = {
    "engines": "4",
    "step-ms": "30",
    "token-us": "60",
    "cache-tokens": "40960",
    "max-num-batched-tokens": "2048",
}
"""Slow enough for two cores to serve four of them with nothing waiting for a core."""
ALLOWED = 0.2
"""Largest error of a prediction."""
_IDLE = Mix(input_tokens=(160, 480), output_tokens=(8, 8))
_IDLE_REQUESTS = 60


@dataclass(frozen=True)
class Case:
    """A load that is predicted and served."""

    name: str
    mix: Mix
    count: int
    """Conversations."""
    rate: float | None
    """At which they arrive; None begins all at once, each after a pause."""

    def drive(self, target: Target, seed: int) -> Load:
        """Put it on a server."""
        conversations = self.mix.draw(seed)
        if self.rate is None:
            return asyncio.run(closed_loop(target, conversations, self.count, self.count))
        times = arrivals(self.rate, 1, seed)
        return asyncio.run(open_loop(target, conversations, times, self.count))

    def chats(self, seed: int) -> Iterator[tuple[float, Chat]]:
        """The same for a simulation."""
        times = iter(lambda: 0.0, None) if self.rate is None else arrivals(self.rate, 1, seed)
        drawn = islice(zip(times, self.mix.draw(seed), strict=False), self.count)
        for number, (begins, conversation) in enumerate(drawn):
            yield begins, _chat(conversation, b"%d/" % number)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `cluster.simulate check`."""
    add_fake_option(parser, SETTINGS)
    parser.add_argument(
        "--rate", type=float, default=16.0, help="requests a second, of all engines"
    )
    parser.add_argument("--requests", type=int, default=1000, help="at that rate")
    parser.add_argument("--chats", type=int, default=64, help="of 8 turns, all at the same time")


def cases(options: argparse.Namespace) -> list[Case]:
    """The loads of the check."""
    return [
        Case("poisson", Mix((160, 480), (32, 96)), options.requests, options.rate),
        Case("chats", Mix((60, 400), (20, 60), turns=8, think_s=2.0), options.chats, None),
    ]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Predict and serve; returns what the result file holds.

    Raises:
        RuntimeError: the server did not start, or requests failed.
        ValueError: an option of the fake engine is not like name=value.
    """
    settings = fake_settings(SETTINGS, options.fake)
    records = []
    with tempfile.TemporaryDirectory(prefix="tl-") as folder:
        for case in cases(options):  # each has a server of its own
            with serve_fake(settings, Path(folder) / f"{case.name}.log") as fake:
                wires = _learn_wires(fake)
                drive = partial(case.drive, fake_target(fake), options.seed)
                records.append(_compare(case, fake, wires, options.seed, drive))
            print(f"{case.name}: {records[-1]['errors']}", file=sys.stderr)
    return {"server": {"fake": settings}, "seed": options.seed, "records": records}


def _compare(
    case: Case, fake: Mapping[str, Any], wires: Wires, seed: int, drive: Callable[[], Load]
) -> dict[str, Any]:
    predicted = _predict(case, fake, wires, seed)
    load, usage = watch(fake["pid"], drive)
    measured = _read(load.read().answers)
    ttft = {name: measured["ttft_ms"][name] for name in ("p50", "p95")}
    errors = {name: predicted["ttft_ms"][name] / ttft[name] - 1 for name in ttft}
    return {
        "load": case.name,
        "plane_ms": round((wires.to_engine_s + wires.from_engine_s) * 1e3, 3),
        "predicted": predicted,
        "measured": measured,
        "errors": {name: round(error, 4) for name, error in errors.items()},
        "holds": all(abs(error) <= ALLOWED for error in errors.values()),
        **usage,
    }


def _predict(
    case: Case, fake: Mapping[str, Any], wires: Wires, seed: int
) -> dict[str, dict[str, float]]:
    settings = CellSettings(
        _shape(fake), fake["engines"], fake["ingresses"], fake["routing_policy"], wires
    )
    tally = Cell(settings, case.chats(seed), seed).run()
    return {"ttft_ms": tally.ttft.spread(), "itl_ms": tally.itl.spread()}


def _shape(fake: Mapping[str, Any]) -> EngineShape:
    return EngineShape(
        StepTime(fake["step_ms"] / 1e3, prefill_token_s=fake["token_us"] / 1e6),
        fake["max_num_seqs"],
        fake["max_num_batched_tokens"],
        fake["cache_tokens"],
        fake["block_size"],
        steps_ahead=1,
    )


def _learn_wires(fake: Mapping[str, Any]) -> Wires:
    """What an idle server takes beside the engine's step: the median over requests of which each
    begins when the one before has ended."""
    mix = _IDLE.draw(seed=-1)
    load = asyncio.run(closed_loop(fake_target(dict(fake)), mix, 1, _IDLE_REQUESTS))
    step_time = _shape(fake).step_time
    beside = [
        answer.events[0][0] - answer.sent - step_time.step(0, 0, answer.prompt_tokens)
        for answer in _good(load.read().answers)
    ]
    plane_s = max(0.0, statistics.median(beside))
    return Wires(plane_s / 2, plane_s / 2)


def _read(answers: Iterable[Answer]) -> dict[str, dict[str, float]]:
    ttft, itl = Histogram(), Histogram()
    for answer in _good(answers):
        times = [when for when, _ in answer.events]
        ttft.add(times[0] - answer.sent)
        for before, after in pairwise(times):
            itl.add(after - before)
    return {"ttft_ms": ttft.spread(), "itl_ms": itl.spread()}


def _good(answers: Iterable[Answer]) -> list[Answer]:
    found = list(answers)
    if failed := [answer.error for answer in found if answer.error or not answer.events]:
        raise RuntimeError(f"{len(failed)} of {len(found)} requests failed: {failed[0]}")
    return found


def _chat(conversation: Conversation, key: bytes) -> Chat:
    turns = [
        Turn(turn.pause_s, count_words(turn.text), turn.output_tokens)
        for turn in conversation.turns
    ]
    return Chat(key, turns)


def table(records: Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table, a line a load; times in ms."""
    heads = ["load", "TTFT p50", "predicted", "error", "TTFT p95", "predicted", "error", "holds"]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for record in records:
        cells = [record["load"]]
        for rank in ("p50", "p95"):
            pair = [record[side]["ttft_ms"][rank] for side in ("measured", "predicted")]
            cells += [f"{value:,.1f}" for value in pair] + [f"{record['errors'][rank]:+.1%}"]
        lines.append([*cells, "yes" if record["holds"] else "no"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
