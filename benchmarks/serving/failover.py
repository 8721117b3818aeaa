"""Streams over processes that die: what is lost, what is wrong, and how long a client waits.

    python -m benchmarks.serving.failover

Starts this project's server with fake engines, kills or stops one of its processes every few
seconds while others live, and compares each answer with what an undisturbed server says.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.machine import describe_run
from benchmarks.serving.answers import Answer
from benchmarks.serving.background import in_background
from benchmarks.serving.conversations import Mix, echo
from benchmarks.serving.fake_server import add_fake_option, fake_settings, fake_target, serve_fake
from benchmarks.serving.leaving import read_health, seconds_until_free
from benchmarks.serving.load import Target, closed_loop
from benchmarks.serving.processes import find_processes, tree

SETTINGS = {"engines": "3", "step-ms": "50"}
FAULTS = (
    "engine_actor:SIGKILL",
    "engine_actor:SIGSTOP",
    "engine_replica:SIGKILL",
    "controller:SIGKILL",
    "node:SIGKILL",
)
"""Role of a process, as in `benchmarks.serving.processes`, and the signal that it gets. A node is
hit with all of its processes."""
FREE_LIMIT_S = 60.0
"""After the last answer, until nothing runs any more and engines are back."""
_POLL_S = 0.2
_FRESH_S = 1.2
"""An engine that has told its load so lately lives: it does so every second."""

Record = dict[str, Any]


class Killer:
    """Sends a signal to one process after another, each time while two engines live.

    Args:
        root: process id of the server.
        target: the server.
        fault: one of `FAULTS`.
        every_s: seconds between signals, or longer until two engines live.
        seed: of the choice of the process.
    """

    def __init__(self, root: int, target: Target, fault: str, every_s: float, seed: int) -> None:
        self.times: list[float] = []
        """When a signal was sent, in seconds of `time.monotonic()`."""
        self._root = root
        self._target = target
        self._role, _, number = fault.partition(":")
        self._number = signal.Signals[number]
        self._every_s = every_s
        self._random = random.Random(seed)
        self._hit: set[int] = set()
        self._end = threading.Event()

    def at_work(self) -> contextlib.AbstractContextManager[None]:
        """Kill until the end of the `with`."""
        return in_background(self._run, self._end)

    def _run(self) -> None:
        while not self._end.wait(self._every_s):
            while not self._end.is_set() and not self._strike():
                self._end.wait(_POLL_S)

    def _strike(self) -> bool:
        """Hit a process if two engines are in service."""
        try:
            engines = read_health(self._target)["engines"]
        except OSError:
            return False
        alive = [e for e in engines if e["age_s"] is not None and e["age_s"] < _FRESH_S]
        whole = [i for i in find_processes(self._root, self._role) if i not in self._hit]
        if len(alive) < 2 or not whole:
            return False
        pid = self._random.choice(whole)
        self._hit.add(pid)
        for each in tree(pid) if self._role == "node" else [pid]:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(each, self._number)
        self.times.append(time.monotonic())
        return True


def settings(fault: str, changed: Iterable[str] = ()) -> list[str]:
    """Settings of the server for a fault; where nodes are hit, each engine has one of its own."""
    nodes = {"nodes": SETTINGS["engines"]} if fault.startswith("node:") else {}
    return fake_settings(SETTINGS | nodes, changed)


def measure(fake: Record, options: argparse.Namespace, fault: str) -> Record:
    """Run the streams while processes are hit, and judge the answers.

    Args:
        fake: the server; see `serve_fake`.
        options: of the command line.
        fault: one of `FAULTS`.
    """
    target = fake_target(fake)
    mix = Mix(tuple(options.input), tuple(options.output))
    killer = Killer(fake["pid"], target, fault, options.every, options.seed)
    with killer.at_work():
        load = asyncio.run(
            closed_loop(target, mix.draw(options.seed), options.streams, options.requests)
        )
    record = judge(load.read().answers, killer.times)
    free_after_s = seconds_until_free(target, FREE_LIMIT_S)
    return {"fault": fault, **record, "free_after_s": round(free_after_s, 3)}


def judge(answers: Iterable[Answer], hits: list[float]) -> Record:
    """Figures of answers during which processes were hit at some times.

    `wrong` counts texts that an undisturbed server would not have given, `pause_s` the longest time
    between two events of each stream in the midst of which a process was hit.
    """
    answers = list(answers)
    pauses = sorted(pause for answer in answers for pause in _pauses(answer, hits))
    return {
        "requests": len(answers),
        "hits": len(hits),
        "errors": dict(Counter(answer.error for answer in answers if answer.error)),
        "wrong": sum(
            answer.text != echo(answer.prompt, answer.asked_tokens)
            for answer in answers
            if not answer.error
        ),
        "pause_s": {
            "p50": round(pauses[len(pauses) // 2], 3) if pauses else None,
            "p99": round(pauses[len(pauses) * 99 // 100], 3) if pauses else None,
            "max": round(pauses[-1], 3) if pauses else None,
        },
    }


def _pauses(answer: Answer, hits: list[float]) -> list[float]:
    """For each hit in the midst of the answer, the longest pause until the next hit."""
    found = []
    for hit, later in zip(hits, [*hits[1:], float("inf")], strict=True):
        gaps = [b - a for (a, _), (b, _) in pairwise(answer.events) if hit <= b and a < later]
        if answer.events and answer.events[0][0] < hit and gaps:
            found.append(max(gaps))
    return found


def main(words: list[str] | None = None) -> None:
    """Run the command line."""
    options = parse(words)
    started = datetime.now(UTC)
    out = options.out or results.FOLDER / f"serving-failover-{started:%Y-%m-%d}.json"
    records = []
    for fault in options.faults:
        with (
            tempfile.TemporaryDirectory(prefix="tl-") as folder,
            serve_fake(settings(fault, options.fake), Path(folder) / "server.log") as fake,
        ):
            records.append(measure(fake, options, fault))
        print(records[-1], file=sys.stderr)
    document = {
        **describe_run("benchmarks.serving.failover", options.words, started),
        "server": fake_settings(SETTINGS, options.fake),
        "records": records,
    }
    results.write(document, out)
    print(out)


def parse(words: list[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.serving.failover", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(words=sys.argv[1:] if words is None else words)
    add_fake_option(parser, SETTINGS)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between hits")
    parser.add_argument("--streams", type=int, default=200, help="at a time")
    parser.add_argument("--requests", type=int, default=800)
    parser.add_argument("--input", type=int, nargs=2, default=[16, 128], help="tokens of a prompt")
    parser.add_argument("--output", type=int, nargs=2, default=[200, 600], help="of an answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file to write, in benchmarks/results if unset")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
