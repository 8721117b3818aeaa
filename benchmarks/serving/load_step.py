"""A load that jumps up and falls again, and fake engines whose number follows it.

    python -m benchmarks.serving.load_step run
    python -m benchmarks.serving.load_step plot benchmarks/results/FILE

`run` writes a JSON file with the decisions of the autoscaling policy, the engines in service, and
the times to the first token by when requests came.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.machine import describe_run
from benchmarks.serving.answers import Answer
from benchmarks.serving.background import in_background
from benchmarks.serving.conversations import Mix, echo
from benchmarks.serving.fake_server import add_fake_option, fake_settings, fake_target, serve_fake
from benchmarks.serving.leaving import read_health
from benchmarks.serving.load import Load, Target, open_loop
from benchmarks.serving.measure import watch
from benchmarks.serving.summary import Record, spread

SETTINGS = {
    "engines": "1",
    "max-engines": "4",
    "step-ms": "50",
    "max-num-seqs": "12",
    "target-ttft-s": "1",
    "downscale-delay-s": "20",
    "drain-s": "60",
}
"""An engine serves about eight requests a second of the mix below. Few engines, as on two cores
those that start take the time of those that run: at eight times the load three are busy."""
ALLOWED_S = 15.0
"""Beyond the start-up time of an engine, first tokens may be late for so long."""
BIN_S = 5.0
_POLL_S = 0.5
_IMAGES = Path(__file__).parents[2] / "docs" / "images"
_DECISION = re.compile(
    r"^INFO (?P<when>\S+ \S+) controller \d+ -- autoscaling \S+: (?P<before>\d+) -> (?P<after>\d+) "
    r"engines .*?: needs (?P<why>.*)$"
)


class Census:
    """Notes how many engines are in service."""

    def __init__(self, target: Target) -> None:
        self.sizes: list[tuple[float, int]] = []
        """When there were how many, by `time.monotonic()`; changes only."""
        self._target = target
        self._end = threading.Event()

    def taken(self) -> AbstractContextManager[None]:
        """Look until the end of the `with`."""
        return in_background(self._run, self._end)

    def _run(self) -> None:
        while not self._end.wait(_POLL_S):
            try:
                engines = read_health(self._target)["engines"]
            except OSError:
                continue
            size = sum(engine["serving"] for engine in engines)
            if not self.sizes or self.sizes[-1][1] != size:
                self.sizes.append((time.monotonic(), size))


def arrivals(phases: Iterable[tuple[float, float]], seed: int) -> Iterator[float]:
    """Seconds after the start at which requests come, Poisson in each of the phases.

    Args:
        phases: length in seconds and requests a second of each.
        seed: of what is drawn.
    """
    rng, begin = random.Random(seed), 0.0
    for seconds, rate in phases:
        now = begin + rng.expovariate(rate)
        while now < begin + seconds:
            yield now
            now += rng.expovariate(rate)
        begin += seconds


def measure(fake: dict[str, Any], options: argparse.Namespace) -> Record:
    """Put the load on the server; the figures, as they go into the result file."""
    target = fake_target(fake)
    low, high, rest = options.seconds
    phases = [(low, options.rate), (high, options.times * options.rate), (rest, options.rate)]
    times = list(arrivals(phases, options.seed))
    mix = Mix(tuple(options.input), tuple(options.output))
    census, offset = Census(target), time.time() - time.monotonic()
    with census.taken():
        load, usage = watch(fake["pid"], partial(_drive, target, mix, times, options.seed))
    begin = load.begin
    decisions = read_decisions(Path(fake["journal"]).parent, begin + offset)
    sizes = [(round(when - begin, 1), size) for when, size in census.sizes]
    figures = judge(load.read().answers, begin, low, low + high, options.target_ttft_s)
    start_up_s = start_up(decisions, sizes, low)
    late, failed = figures["late_until_s"], figures["lost"] or figures["wrong"]
    in_time = late is None or (start_up_s is not None and late <= start_up_s + ALLOWED_S)
    return {
        "load": f"1 to {options.times:g} times",
        "phases": phases,
        **figures,
        "start_up_s": start_up_s,
        "holds": in_time and not failed,
        "decisions": decisions,
        "sizes": sizes,
        **usage,
    }


def _drive(target: Target, mix: Mix, times: list[float], seed: int) -> Load:
    return asyncio.run(open_loop(target, mix.draw(seed), iter(times), len(times)))


def read_decisions(folder: Path, began_at: float) -> list[Record]:
    """The policy's decisions out of the log of Serve's controller.

    Args:
        folder: of the server's Ray.
        began_at: seconds since the epoch from which their times count.
    """
    found = []
    # `session_latest` is one of the others.
    logs = {file.resolve() for file in folder.glob("session_*/logs/serve/controller_*.log")}
    for file in logs:
        for line in file.read_text().splitlines():
            if match := _DECISION.match(line):
                when = datetime.strptime(match["when"], "%Y-%m-%d %H:%M:%S,%f")
                change = {"from": int(match["before"]), "to": int(match["after"])}
                at_s = round(when.timestamp() - began_at, 1)
                found.append({"at_s": at_s, **change, "why": match["why"]})
    return sorted(found, key=lambda decision: float(str(decision["at_s"])))


def start_up(
    decisions: Iterable[Record], sizes: list[tuple[float, int]], step_s: float
) -> float | None:
    """Seconds from the first decision for more engines after the step until they are there."""
    first = next((d for d in decisions if d["at_s"] >= step_s and d["to"] > d["from"]), None)
    if first is None:
        return None
    there = (when for when, size in sizes if when > first["at_s"] and size >= first["to"])
    came = next(there, None)
    return None if came is None else round(came - first["at_s"], 1)


def judge(
    answers: list[Answer], begin: float, step_s: float, back_s: float, target_s: float
) -> Record:
    """Figures of the answers.

    `late_until_s` is the end, in seconds after the step up, of the last bin before the step down
    whose 95th percentile is over the target; None if there is none. `lost` counts requests without
    an answer by what went wrong, `wrong` those whose answer is not what an engine must say.
    """
    bins: dict[int, list[float]] = {}
    for answer in answers:
        if answer.events:
            number = int((answer.sent - begin) // BIN_S)
            bins.setdefault(number, []).append(answer.events[0][0] - answer.sent)
    p95 = {round(n * BIN_S, 1): _p95(times) for n, times in sorted(bins.items())}
    late = [
        at + BIN_S for at, seconds in p95.items() if step_s <= at < back_s and seconds > target_s
    ]
    return {
        "requests": len(answers),
        "lost": dict(Counter(a.error or "no text" for a in answers if a.error or not a.events)),
        "wrong": sum(
            answer.text != echo(answer.prompt, answer.asked_tokens)
            for answer in answers
            if answer.error is None
        ),
        "ttft_ms": spread(a.events[0][0] - a.sent for a in answers if a.events),
        "ttft_p95_s": [(at, round(seconds, 3)) for at, seconds in p95.items()],
        "late_until_s": round(late[-1] - step_s, 1) if late else None,
    }


def _p95(times: list[float]) -> float:
    return sorted(times)[max(0, -(-len(times) * 95 // 100) - 1)]


def run(options: argparse.Namespace) -> None:
    """Run the load and write the file."""
    started = datetime.now(UTC)
    out = options.out or results.FOLDER / f"serving-autoscaling-{started:%Y-%m-%d}.json"
    settings = fake_settings(SETTINGS, options.fake)
    with (
        tempfile.TemporaryDirectory(prefix="tl-") as folder,
        serve_fake(settings, Path(folder) / "server.log") as fake,
    ):
        options.target_ttft_s = fake["target_ttft_s"]
        record = measure(fake, options)
    document = {
        **describe_run("benchmarks.serving.load_step", options.words, started),
        "server": {"fake": settings},
        "target_ttft_s": options.target_ttft_s,
        "records": [record],
    }
    results.write(document, out)
    hidden = ("decisions", "sizes", "ttft_p95_s", "cpu_s")
    print(out, {name: value for name, value in record.items() if name not in hidden})


def plot(options: argparse.Namespace) -> None:
    """Draw what `run` wrote."""
    from benchmarks.serving.plots import plot_load_step

    for file in plot_load_step(results.read(options.file), options.images, options.file.stem):
        print(file)


def main(words: list[str] | None = None) -> None:
    """Run the command line."""
    options = parse(words)
    options.action(options)


def parse(words: list[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.serving.load_step", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run", help="measure and write a result file")
    running.set_defaults(action=run, words=sys.argv[1:] if words is None else words)
    add_fake_option(running, SETTINGS)
    running.add_argument("--rate", type=_positive, default=1.5, help="requests a second before")
    running.add_argument("--times", type=_positive, default=8.0, help="the rate, in between")
    running.add_argument(
        "--seconds", type=_positive, nargs=3, default=[30, 90, 90], help="before, in between, after"
    )
    running.add_argument("--input", type=int, nargs=2, default=[16, 64], help="tokens of a prompt")
    running.add_argument("--output", type=int, nargs=2, default=[20, 40], help="of an answer")
    running.add_argument("--seed", type=int, default=0)
    running.add_argument("--out", type=Path, help="file to write, in benchmarks/results if unset")
    plotting = commands.add_parser("plot", help="draw what `run` wrote")
    plotting.set_defaults(action=plot)
    plotting.add_argument("file", type=Path)
    plotting.add_argument("--images", type=Path, default=_IMAGES, help="folder to draw into")
    return parser.parse_args(words)


def _positive(text: str) -> float:
    """A number above 0, or an error that says so."""
    with suppress(ValueError):
        if 0 < (number := float(text)) < math.inf:
            return number
    raise argparse.ArgumentTypeError(f"{text} is not a number above 0")


if __name__ == "__main__":
    main()
