"""More load than fake engines can carry: who is refused, how soon, and what it costs the others."""

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

import msgspec

from benchmarks.serving.answers import bodies
from benchmarks.serving.conversations import Mix, arrivals
from benchmarks.serving.fake_server import add_fake_option, fake_settings, fake_target, serve_fake
from benchmarks.serving.load import Load, Sent, Target, open_loop
from benchmarks.serving.measure import watch
from benchmarks.serving.summary import Record, number, ranks, share, spread, summarise

SETTINGS = {
    "engines": "2",
    "step-ms": "25",
    "max-num-seqs": "16",
    "max-ongoing-requests": "24",
    "max-queued-requests": "16",
}
"""Half as many requests as run may wait at each engine, and 16 more in the ingress."""
UNLOADED = 0.5
"""Share of its capacity at which a server is taken for unloaded."""
_REFUSALS = (429, 503)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `benchmarks.serving overload`."""
    add_fake_option(parser, SETTINGS)
    parser.add_argument(
        "--times", type=float, nargs="+", default=[4.0], help="load over what the engines can do"
    )
    parser.add_argument("--rounds", type=int, default=3, help="over all loads, in turn")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each load")
    parser.add_argument("--input", type=int, nargs=2, default=[16, 64], help="tokens of a prompt")
    parser.add_argument("--output", type=int, nargs=2, default=[48, 80], help="of an answer")
    parser.add_argument("--seed", type=int, default=0, help="of texts, lengths and arrivals")
    parser.add_argument("--out", type=Path, help="file to write, in benchmarks/results if unset")


def measure(options: argparse.Namespace) -> Iterator[Record]:
    """Put `UNLOADED` of what the engines can carry on them and more than that, in turn.

    Args:
        options: of `benchmarks.serving overload`.

    Raises:
        RuntimeError: the server did not start.
        ValueError: an option of the fake engine is not like name=value.
    """
    mix = Mix(tuple(options.input), tuple(options.output))
    with (
        tempfile.TemporaryDirectory(prefix="tl-") as folder,
        serve_fake(fake_settings(SETTINGS, options.fake), Path(folder) / "server.log") as fake,
    ):
        target, capacity = fake_target(fake), _capacity(fake, mix)
        for times in (UNLOADED, *options.times) * options.rounds:
            rate = times * capacity
            load, usage = watch(fake["pid"], partial(_drive, options, target, mix, rate))
            print(f"{times:g} x capacity is done", file=sys.stderr)
            yield {"load": f"{times:g} x capacity", "rate": rate, **judge(load), **usage}


def _capacity(fake: dict[str, Any], mix: Mix) -> float:
    """Requests a second that the engines can carry: rows over the time that one takes."""
    steps = sum(mix.output_tokens) / 2
    return float(fake["engines"] * fake["max_num_seqs"] / (steps * fake["step_ms"] / 1e3))


def _drive(options: argparse.Namespace, target: Target, mix: Mix, rate: float) -> Load:
    count = round(rate * options.seconds)
    times = arrivals(rate, 1, options.seed)
    return asyncio.run(open_loop(target, mix.draw(options.seed), times, count))


def judge(load: Load) -> Record:
    """The figures of a load of which a part was refused.

    `refusal_ms` runs from when a request was due to the end of its refusal; `malformed` counts
    refusals without `Retry-After` or without OpenAI's error object. Other figures are those of the
    requests that were accepted.
    """
    refused = [each for each in load.sent if each.exchange.status in _REFUSALS]
    others = [each for each in load.sent if each.exchange.status not in _REFUSALS]
    return summarise(Load(load.begin, others, load.end).read()) | {
        "offered": len(load.sent),
        "refused": dict(Counter(str(each.exchange.status) for each in refused)),
        "refusal_ms": spread(each.exchange.pieces[-1][0] - each.exchange.sent for each in refused),
        "malformed": sum(not _is_well_formed(each) for each in refused),
    }


def _is_well_formed(sent: Sent) -> bool:
    body = b"".join(data for _, data in bodies(sent.exchange))
    try:
        error = msgspec.json.decode(body)["error"]
    except (msgspec.MsgspecError, KeyError, TypeError):
        return False
    says_why = isinstance(error, dict) and bool(error.get("message"))
    return says_why and (sent.exchange.retry_after or "").isdigit()


def table(records: Iterable[Record]) -> str:
    """A Markdown table, a line a load; times in ms."""
    heads = [
        "load", "offered", "accepted", "failed", "refused", "malformed",
        "refusal p50", "p99", "ITL p50", "p90", "p99", "TTFT p50", "p99", "tok/s", "disturbance",
    ]  # fmt: skip
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *map(_cells, records)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(record: Record) -> list[str]:
    refused = [f"{count} × {status}" for status, count in record["refused"].items()]
    return [
        record["load"],
        str(record["offered"]),
        str(record["completed"]),
        str(sum(record["errors"].values())),
        ", ".join(refused) or "0",
        str(record["malformed"]),
        *ranks(record["refusal_ms"], "p50", "p99"),
        *ranks(record["itl_ms"], "p50", "p90", "p99"),
        *ranks(record["ttft_ms"], "p50", "p99"),
        number(record["output_tok_s"]),
        share(record["disturbance"]),
    ]
