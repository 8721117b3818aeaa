"""Chats over several fake engines, under each routing policy: who finds its cache, who has work."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.serving.answers import Answer
from benchmarks.serving.conversations import Mix
from benchmarks.serving.fake_server import add_fake_option, fake_settings, fake_target, serve_fake
from benchmarks.serving.journal import EngineJournal, Journal
from benchmarks.serving.load import Target, closed_loop
from benchmarks.serving.measure import watch
from benchmarks.serving.prefixes import InfiniteCache
from benchmarks.serving.summary import Record, ranks, share, summarise

POLICIES = ("prefix_load", "round_robin", "power_of_two")
SETTINGS = {
    "engines": "4",
    "step-ms": "8",
    "token-us": "20",
    "cache-tokens": "40960",
    "max-num-batched-tokens": "2048",
}
"""About the pace of a 7B model on an H200. What the usual chats have said in the end is three times
as much as one engine's cache holds, and fits into four."""
BURST = 16
"""Requests sent at once."""
_BURST_MIX = Mix(input_tokens=(160, 480), output_tokens=(64, 64))
_LOADS = ("requests", "computed_tokens", "output_tokens")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `benchmarks.serving multi-turn`."""
    add_fake_option(parser, SETTINGS)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--conversations", type=int, default=64, help="all at the same time")
    parser.add_argument("--turns", type=int, default=8, help="of a conversation")
    parser.add_argument("--input", type=int, nargs=2, default=[60, 400], help="tokens of a turn")
    parser.add_argument("--output", type=int, nargs=2, default=[20, 60], help="of an answer")
    parser.add_argument("--think", type=float, default=2.0, help="mean seconds before a turn")
    parser.add_argument("--prefix", type=int, default=0, help="tokens all conversations begin with")
    parser.add_argument("--prefixes", type=int, default=1, help="different such beginnings")
    parser.add_argument("--bursts", type=int, default=10, help=f"of {BURST} requests, afterwards")
    parser.add_argument("--seed", type=int, default=0, help="of texts, lengths and pauses")
    parser.add_argument("--out", type=Path, help="file to write, in benchmarks/results if unset")


def measure(options: argparse.Namespace) -> Iterator[Record]:
    """Serve the same chats, and then bursts, under one policy after the other.

    Args:
        options: of `benchmarks.serving multi-turn`.

    Raises:
        RuntimeError: a server did not start.
        ValueError: an option of the fake engine is not like name=value.
    """
    for policy in options.policies:
        settings = [*fake_settings(SETTINGS, options.fake), f"routing-policy={policy}"]
        with (
            tempfile.TemporaryDirectory(prefix="tl-") as folder,
            serve_fake(settings, Path(folder) / "server.log") as fake,
        ):
            record = {"policy": policy, **_measure_policy(options, fake)}
        print(f"{policy}: {share(record['of_infinite_hits'])} of all hits", file=sys.stderr)
        yield record


def _measure_policy(options: argparse.Namespace, fake: dict[str, Any]) -> Record:
    """Have the chats, then the bursts, and count."""
    target = fake_target(fake)
    mix = Mix(
        tuple(options.input),
        tuple(options.output),
        options.turns,
        options.prefix,
        options.prefixes,
        options.think,
    )
    count = options.conversations
    chats = partial(closed_loop, target, mix.draw(options.seed), clients=count, count=count)
    load, usage = watch(fake["pid"], lambda: asyncio.run(chats()))
    run = load.read()
    splits = send_bursts(target, Path(fake["journal"]), options.bursts)
    engines = Journal(Path(fake["journal"])).engines
    return {
        "load": f"{count} chats",
        **summarise(run),
        **judge(run.answers, engines, fake["block_size"]),
        "bursts": dict(Counter("/".join(map(str, split)) for split in splits)),
        **usage,
    }


def judge(answers: Iterable[Answer], engines: Iterable[EngineJournal], block_size: int) -> Record:
    """Hits and loads of each engine, and what they are beside the best that could be.

    `imbalance` is the largest engine's figure over the mean; `computed_tokens` are prompt tokens
    that were not in the cache when the request began.
    """
    good = [answer for answer in answers if answer.error is None]
    rows = [_account(engine, good) for engine in engines]
    hits = sum(row["hit_tokens"] for row in rows)
    cache = InfiniteCache(block_size)
    possible = cache.replay(good)
    return {
        "prompt_tokens": sum(row["prompt_tokens"] for row in rows),
        "hit_tokens": hits,
        "infinite_hit_tokens": possible,
        "infinite_cache_tokens": cache.num_tokens,
        "of_infinite_hits": round(hits / possible, 4) if possible else None,
        "imbalance": {name: _imbalance([row[name] for row in rows]) for name in _LOADS},
        "engines": rows,
    }


def _account(engine: EngineJournal, answers: Iterable[Answer]) -> Record:
    mine = [answer for answer in answers if answer.request_id in engine.admissions]
    admissions = [engine.admissions[answer.request_id] for answer in mine]
    prompt = sum(each[0].prompt_tokens for each in admissions)
    hits = sum(each[0].cached_tokens for each in admissions)
    return {
        "requests": len(mine),
        "prompt_tokens": prompt,
        "hit_tokens": hits,
        "computed_tokens": prompt - hits,
        "output_tokens": sum(answer.output_tokens for answer in mine),
        "preemptions": sum(len(each) - 1 for each in admissions),
    }


def _imbalance(figures: list[int]) -> float | None:
    total = sum(figures)
    return round(max(figures) * len(figures) / total, 3) if total else None


def send_bursts(target: Target, journal: Path, count: int) -> list[list[int]]:
    """Send `BURST` requests at once, `count` times, each when the one before has ended.

    Returns:
        Of each burst, the requests that each engine got, most first.
    """
    splits = []
    for seed in range(count):
        burst = closed_loop(target, _BURST_MIX.draw(seed), clients=BURST, count=BURST)
        ids = {answer.request_id for answer in asyncio.run(burst).read().answers}
        engines = Journal(journal).engines
        splits.append(sorted((len(ids & e.admissions.keys()) for e in engines), reverse=True))
    return splits


def table(records: Iterable[Record]) -> str:
    """A Markdown table, a line a policy; times in ms."""
    heads = [
        "policy", "requests", "errors", "prompt tokens", "hits", "of an infinite cache",
        *(f"{name.replace('_', ' ')}, max / mean" for name in _LOADS),
        "TTFT p50", "p90", "p99", "bursts", "disturbance",
    ]  # fmt: skip
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *map(_cells, records)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(record: Record) -> list[str]:
    bursts = [f"{times} × {split}" for split, times in record["bursts"].items()]
    return [
        record["policy"],
        str(record["requests"]),
        str(sum(record["errors"].values())),
        f"{record['prompt_tokens']:,}",
        f"{record['hit_tokens']:,}",
        share(record["of_infinite_hits"]),
        *(f"{record['imbalance'][name]:.2f}" for name in _LOADS),
        *ranks(record["ttft_ms"], "p50", "p90", "p99"),
        ", ".join(bursts) or "-",
        share(record["disturbance"]),
    ]
