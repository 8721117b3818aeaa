"""A storm of disconnects: clients leave at random moments, round after round.

    python -m benchmarks.serving.storm

Starts this project's server with a fake engine, on each set of flags, and writes a result file: how
long it takes until all blocks are free again, and how the processes' memory grows.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.machine import describe_run
from benchmarks.serving.fake_server import fake_target, serve_fake
from benchmarks.serving.leaving import (
    Left,
    draw_leavers,
    run_leavers,
    seconds_until_free,
)
from benchmarks.serving.processes import read_memory

_FREE_LIMIT_S = 60.0
"""A round that is not over by then ends the run."""
_CACHE_TOKENS = 2**17
"""Room for all streams of a round, and little enough that the engine's prefix cache and what the
ingress knows of it are full, and so have stopped growing, before memory is compared."""
_COLLECT_S = 1.0
"""Between collections of garbage in the server's processes; see `fake.collect`."""
_SETTLE_S = 3.0
"""After a round, before memory is read: long enough for a collection."""

Record = dict[str, Any]


def main(words: list[str] | None = None) -> None:
    """Run the command line."""
    options = _parse(words)
    started = datetime.now(UTC)
    out = options.out or results.FOLDER / f"serving-storm-{started:%Y-%m-%d}.json"
    document = describe_run("benchmarks.serving.storm", options.words, started)
    records = []
    for flags in options.flags:
        rounds = list(_storm(options, flags))
        records += rounds
        document[f"{flags}_flags"] = summarise(rounds, options.baseline)
        print(f"{flags} flags: {document[f'{flags}_flags']}")
    results.write({**document, "records": records}, out)
    print(out)


def _storm(options: argparse.Namespace, flags: str) -> Iterator[Record]:
    settings = [
        f"flags={flags}",
        f"step-ms={options.step_ms:g}",
        f"collect-s={_COLLECT_S:g}",
        f"cache-tokens={_CACHE_TOKENS}",
    ]
    with (
        tempfile.TemporaryDirectory(prefix="tl-") as folder,
        serve_fake(settings, Path(folder) / "server.log") as fake,
    ):
        target = fake_target(fake)
        for number in range(1, options.rounds + 1):
            seed = options.seed + number
            leavers = draw_leavers(target, options.latest, options.step_ms / 1e3, seed)
            lefts = asyncio.run(run_leavers(target, list(islice(leavers, options.streams))))
            free_after_s = seconds_until_free(target, _FREE_LIMIT_S)
            time.sleep(_SETTLE_S)
            memory = {role: round(value, 2) for role, value in read_memory(fake["pid"]).items()}
            record = {"flags": flags, "round": number, "free_after_s": round(free_after_s, 3)}
            yield {**record, **count(lefts), "memory_mib": memory}
            print(f"{flags} flags, round {number}: free after {free_after_s:.2f} s, {memory}",
                  file=sys.stderr)  # fmt: skip


def count(lefts: list[Left]) -> Record:
    """How many clients left when, as it turned out, and what was wrong."""
    return {
        "streams": len(lefts),
        "without_answer": sum(not left.received for left in lefts),
        "in_the_middle": sum(bool(left.received) and not left.whole for left in lefts),
        "whole": sum(left.whole for left in lefts),
        "received_mib": round(sum(len(left.received) for left in lefts) / 2**20, 3),
        "cuts": Counter(f"{left.cut}: {left.status or 'no answer'}" for left in lefts),
        "errors": Counter(left.error for left in lefts if left.error),
    }


def summarise(rounds: list[Record], baseline: int) -> Record:
    """The longest time until all was free, and the growth of each role's memory since a round.

    Args:
        rounds: in their order.
        baseline: number of the round after which memory should stay as it is.
    """
    longest = max(each["free_after_s"] for each in rounds)
    after = [each["memory_mib"] for each in rounds if each["round"] >= baseline]
    if not after:
        return {"free_after_s_max": longest}
    first, last = after[0], after[-1]
    growth = {role: round(last[role] / first[role] - 1, 4) for role in first if first[role]}
    return {"free_after_s_max": longest, "memory_growth": growth}


def _parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.serving.storm", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(words=sys.argv[1:] if words is None else words)
    parser.add_argument("--streams", type=int, default=500, help="of a round")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--baseline", type=int, default=5, help="round that growth counts from")
    parser.add_argument("--latest", type=float, default=3.0, help="seconds until a client leaves")
    parser.add_argument("--step-ms", type=float, default=25.0, help="time of an engine's step")
    choices = ("fast", "default")
    parser.add_argument("--flags", nargs="+", choices=choices, default=choices)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file to write, in benchmarks/results if unset")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
