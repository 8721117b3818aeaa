"""A soak: mixed traffic and random faults for a long time, with an account of every request.

    python -m benchmarks.serving.soak --minutes 30

Starts this project's server with fake engines and goes through rounds: clients of all kinds come
for a while, in the midst of which processes are killed, stopped and updated; then nobody comes, all
must end, and everything must be free. The first rounds and the last go without faults. Writes a
result file; the exit status is 1 if anything was lost, wrong or leaked.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.machine import describe_run
from benchmarks.serving.client import Receiver
from benchmarks.serving.fake_server import (
    FakeServer,
    add_fake_option,
    fake_settings,
    fake_target,
    serve_fake,
)
from benchmarks.serving.leaving import is_free, read_health
from benchmarks.serving.processes import PLANE, memory_by_process
from benchmarks.serving.soak.faults import FAULTS, Striker
from benchmarks.serving.soak.memory import SAMPLES, MemoryWatch
from benchmarks.serving.soak.outcome import Outcome, Said, judge, read
from benchmarks.serving.soak.scripts import Script, draw_scripts
from benchmarks.serving.soak.traffic import Crowd, ask

SETTINGS = {
    "engines": "3",
    "ingresses": "2",
    "step-ms": "50",
    "cache-tokens": "32768",
    "max-concurrent-requests": "96",
    "collect-s": "2",
    "drain-s": "60",
}
"""Little enough room for blocks to run short at times, and for bursts to be refused."""
LONGEST = 300
"""Tokens of an answer."""
VARIANTS = 3
"""Of each kind of request."""
FREE_LIMIT_S = 60.0
"""After the last answer of a round, until everything is free."""
AGREED = 6
"""So many answers of `/health` in a row, of either ingress, must say so."""
SETTLE_S = 5.0
"""Without traffic, before memory is read: long enough for a collection of garbage."""
BAD = (Outcome.WRONG, Outcome.LOST)

Record = dict[str, Any]


class Soak:
    """A soak of one server.

    Args:
        fake: the server.
        options: of the command line.
        receiver: receives for all clients.
    """

    def __init__(self, fake: FakeServer, options: argparse.Namespace, receiver: Receiver) -> None:
        self._fake = fake
        self._options = options
        self._receiver = receiver
        self._target = fake_target(fake)
        self._scripts = draw_scripts(fake["model"], LONGEST, VARIANTS, options.seed)
        self._right: dict[Script, Said] = {}
        self._striker = Striker(fake, options.faults, options.seed)
        self._memory = MemoryWatch()
        self._most = 0, 0
        """Requests and blocks; see `_watch_load`."""
        self._crowd = Crowd(self._target, receiver, self._scripts, options.clients, options.seed)

    async def run(self) -> Record:
        """Go through rounds until the time is up; returns what was found."""
        await self._ask_undisturbed()
        begin = time.monotonic()
        rounds = await go_through(self._round, 60 * self._options.minutes)
        outcomes = sum((Counter(each["outcomes"]) for each in rounds), Counter[str]())
        return {
            "seconds": round(time.monotonic() - begin),
            "outcomes": dict(outcomes),
            "faults": Counter(each["fault"] for each in self._striker.struck),
            "not_free": sum(each["free_after_s"] is None for each in rounds),
            "memory": self._memory.summarise(),
            "struck": self._striker.struck,
            "records": rounds,
        }

    async def _ask_undisturbed(self) -> None:
        """Learn the right answers.

        Raises:
            RuntimeError: the server does not answer as it should.
        """
        asked = (ask(self._target, self._receiver, script) for script in self._scripts)
        for sent in await asyncio.gather(*asked):
            if sent.exchange.status != sent.script.status:
                raise RuntimeError(f"{sent.script.name}: {sent.exchange}")
            if sent.script.status == 200:
                self._right[sent.script] = read(sent.exchange)

    async def _round(self, strikes: bool) -> Record:
        """Traffic and perhaps faults, then neither until everything has ended."""
        number = len(self._striker.struck)
        end = time.monotonic() + (self._options.round_s if strikes else 0.0)
        watching = asyncio.create_task(self._watch_load())
        sent, _ = await asyncio.gather(
            self._crowd.come(self._options.round_s, self._options.burst), self._strike(end)
        )
        load = self._most
        free_after_s = await asyncio.to_thread(self._seconds_until_free)
        watching.cancel()
        await asyncio.sleep(SETTLE_S)
        self._memory.take(await asyncio.to_thread(memory_by_process, self._fake["pid"]))
        judged = [judge(each, self._right, self._striker.windows) for each in sent]
        return {
            "outcomes": dict(Counter(str(outcome) for outcome, _ in judged)),
            "bad": [why for outcome, why in judged if outcome in BAD][:5],
            "faults": [each["fault"] for each in self._striker.struck[number:]],
            "most_running": load[0],
            "most_blocks": load[1],
            "free_after_s": free_after_s,
        }

    async def _strike(self, end: float) -> None:
        while (wait := self._striker.draw_pause(self._options.every)) < end - time.monotonic():
            await asyncio.sleep(wait)
            await self._striker.strike()

    async def _watch_load(self) -> None:
        """Note the most requests and blocks that all engines together had in use."""
        self._most = 0, 0
        while True:
            with suppress(OSError):
                engines = (await asyncio.to_thread(read_health, self._target))["engines"]
                running = sum(engine["running"] + engine["waiting"] for engine in engines)
                blocks = sum(engine["total_blocks"] - engine["free_blocks"] for engine in engines)
                self._most = max(self._most[0], running), max(self._most[1], blocks)
            await asyncio.sleep(1.0)

    def _seconds_until_free(self) -> float | None:
        """Until all ingresses say that everything is free; None if that takes too long."""
        begin, agreed = time.monotonic(), 0
        while agreed < AGREED:
            if time.monotonic() - begin > FREE_LIMIT_S:
                return None
            try:
                agreed = agreed + 1 if is_free(read_health(self._target)) else 0
            except OSError:
                agreed = 0
            time.sleep(0.1)
        return round(time.monotonic() - begin, 1)


async def go_through(
    go_round: Callable[[bool], Awaitable[Record]],
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> list[Record]:
    """Go through rounds with faults, and before and after them rounds without.

    So the first processes and the last live long enough for their memory to be judged.

    Args:
        go_round: one round, with faults or without.
        seconds: for all of them, if that is enough for those without faults.
        clock: seconds.
    """
    begin = clock()
    rounds: list[Record] = []

    async def go(strikes: bool) -> None:
        rounds.append(await go_round(strikes))
        print(f"round {len(rounds)}: {rounds[-1]}", file=sys.stderr, flush=True)

    for _ in range(SAMPLES):
        await go(False)
    while (clock() - begin) * (1 + SAMPLES / len(rounds)) < seconds:
        await go(True)
    for _ in range(SAMPLES):
        await go(False)
    return rounds


def has_passed(record: Record) -> bool:
    """Whether no request was lost or wrong, everything became free, and memory stayed flat."""
    bad = sum(record["outcomes"].get(outcome, 0) for outcome in BAD)
    memory = record["memory"]
    flat = all(role in memory for role in PLANE) and all(each["flat"] for each in memory.values())
    return not bad and not record["not_free"] and flat


def main(words: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parse(words)
    started = datetime.now(UTC)
    out = options.out or results.FOLDER / f"serving-soak-{started:%Y-%m-%d}.json"
    settings = fake_settings(SETTINGS, options.fake)
    with (
        tempfile.TemporaryDirectory(prefix="tl-") as folder,
        serve_fake(settings, Path(folder) / "server.log") as fake,
        Receiver() as receiver,
    ):
        record = asyncio.run(_run(fake, options, receiver))
    passed = has_passed(record)
    document = {
        **describe_run("benchmarks.serving.soak", options.words, started),
        "server": settings,
        "passed": passed,
        **record,
    }
    results.write(document, out)
    print(f"{out}: {'passed' if passed else 'FAILED'}, {record['outcomes']}")
    return 0 if passed else 1


async def _run(fake: FakeServer, options: argparse.Namespace, receiver: Receiver) -> Record:
    return await Soak(fake, options, receiver).run()


def _parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.serving.soak", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(words=sys.argv[1:] if words is None else words)
    add_fake_option(parser, SETTINGS)
    parser.add_argument(
        "--minutes", type=float, default=30.0, help=f"at least {2 * SAMPLES} rounds"
    )
    parser.add_argument("--clients", type=int, default=40, help="at a time")
    parser.add_argument(
        "--burst", type=int, default=200, help="clients that come at once in a round"
    )
    parser.add_argument("--round-s", type=float, default=45.0, help="seconds that clients come for")
    parser.add_argument("--every", type=float, default=8.0, help="mean seconds between faults")
    parser.add_argument("--faults", nargs="+", choices=tuple(FAULTS), default=tuple(FAULTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file to write, in benchmarks/results if unset")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
