"""Puts one load after the other on a server, and watches who spends CPU time on it."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.machine import read_cpu_seconds
from benchmarks.serving.answers import Run
from benchmarks.serving.conversations import Conversation, Mix, arrivals
from benchmarks.serving.guidellm import run_guidellm
from benchmarks.serving.journal import Journal
from benchmarks.serving.load import Load, Target, closed_loop, open_loop
from benchmarks.serving.processes import CORE, read_cpu
from benchmarks.serving.summary import Record, summarise, summarise_fake

T = TypeVar("T")

_WARM_UP = 64
"""Most conversations that run, unmeasured, before the first load."""


def measure(
    options: argparse.Namespace, target: Target, fake: dict[str, Any] | None, pid: int | None
) -> Iterator[Record]:
    """Measure one load after the other.

    Args:
        options: of `benchmarks.serving run`.
        target: the server.
        fake: what the fake server said when it was ready, if it is one.
        pid: the server's process, if it is on this machine and to be watched.

    Raises:
        RuntimeError: no request of the warm-up succeeded, or the load generator failed.
        ValueError: options contradict each other.
    """
    mix = Mix(
        tuple(options.input), tuple(options.output), options.turns, options.prefix, options.prefixes
    )
    levels = options.rate or options.clients
    _warm_up(target, mix, options.seed - 1, int(min(max(levels), _WARM_UP)))
    for level, count in zip(levels, _counts(options.requests, levels), strict=True):
        name = f"{level:g} {'arrival/s' if options.rate else 'client'}"
        drive = partial(_drive, options, target, mix.draw(options.seed), level, count)
        result, usage = watch(pid, drive)
        run = result if isinstance(result, Run) else result.read()
        kind = "rate" if options.rate else "clients"
        record = {"load": name, kind: level, **summarise(run), **usage}
        journal = Journal(Path(fake["journal"])) if fake is not None else None
        if journal is not None:
            record["cpu_s"][CORE] = round(journal.cpu(run.begin, run.end), 2)
        _price(record)
        if fake is not None and journal is not None:
            record |= summarise_fake(run, journal, by_token=options.driver == "own")
            _add_offered(record, fake)
        print(f"{name}: {record['output_tok_s']:,.0f} tok/s", file=sys.stderr)
        yield record


def _warm_up(target: Target, mix: Mix, seed: int, count: int) -> None:
    """Run some conversations of the mix.

    Raises:
        RuntimeError: none succeeded.
    """
    run = asyncio.run(closed_loop(target, mix.draw(seed), count, count)).read()
    if all(errors := [answer.error for answer in run.answers]):
        raise RuntimeError(f"no request of the warm-up succeeded: {errors[0]}")


def watch(pid: int | None, drive: Callable[[], T]) -> tuple[T, Record]:
    """Run one load; with it the CPU seconds spent meanwhile, by role, and the disturbance.

    Args:
        pid: the server's process, if it is on this machine and to be watched.
        drive: puts the load on the server.
    """
    machine, own = read_cpu_seconds()[0], _own_cpu()
    server = read_cpu(pid) if pid else {}
    begin = time.monotonic()
    result = drive()
    seconds = time.monotonic() - begin
    after = read_cpu(pid) if pid else {}
    cpu = {role: after[role] - server[role] for role in server} | {"client": _own_cpu() - own}
    others = read_cpu_seconds()[0] - machine - sum(cpu.values())
    disturbance = max(0.0, others / (seconds * (os.cpu_count() or 1)))
    return result, {
        "cpu_s": {role: round(value, 2) for role, value in cpu.items()},
        "disturbance": round(disturbance, 3) if pid else None,
    }


def _drive(
    options: argparse.Namespace,
    target: Target,
    conversations: Iterator[Conversation],
    level: float,
    count: int,
) -> Run | Load:
    """Put a load on the server with the driver of choice."""
    if options.driver == "guidellm":
        if options.rate:
            raise ValueError(
                "GuideLLM 0.8 is late with the first arrivals of an open loop and then sends them "
                "all at once; take --driver own, or --clients"
            )
        program, clients = options.guidellm, int(level)
        with tempfile.TemporaryDirectory() as folder:
            return run_guidellm(program, target, conversations, clients, count, Path(folder))
    if options.rate:
        times = arrivals(level, options.burst, options.seed)
        return asyncio.run(open_loop(target, conversations, times, count))
    return asyncio.run(closed_loop(target, conversations, int(level), count))


def _own_cpu() -> float:
    """CPU seconds of this process and of children that have ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def _price(record: Record) -> None:
    """Add the CPU time of each role a token, in µs."""
    tokens = record["output_tokens"]
    record["cpu_us_per_token"] = {
        role: round(seconds / tokens * 1e6, 2)
        for role, seconds in record["cpu_s"].items()
        if tokens
    }


def _add_offered(record: Record, fake: dict[str, Any]) -> None:
    """Add the speed that the fake engines would have with no plane around them, and the share of
    it that clients saw while all of them had work."""
    if "clients" in record:
        rows = min(record["clients"], fake["engines"] * fake["max_num_seqs"])
        record["offered_tok_s"] = round(rows * 1e3 / fake["step_ms"], 1)
        if record["steady_tok_s"] is not None:
            record["of_offered"] = round(record["steady_tok_s"] / record["offered_tok_s"], 4)


def _counts(requests: list[int] | None, levels: list[float]) -> list[int]:
    """Conversations of each load.

    Raises:
        ValueError: there is neither one number for all nor one for each.
    """
    if requests is None:
        return [max(12, 5 * int(level)) for level in levels]
    if len(requests) not in (1, len(levels)):
        raise ValueError(f"--requests must have one value or {len(levels)}, one for each load")
    return requests * len(levels) if len(requests) == 1 else requests
