"""Measures a server over HTTP: latencies, speed, errors, and where its CPU time goes.

    python -m benchmarks.serving run --fake --clients 128 --input 16 32 --output 400 400
    python -m benchmarks.serving run --target http://127.0.0.1:8000 --clients 1 16 64 256
    python -m benchmarks.serving run --target http://127.0.0.1:8000 --rate 4 8 --requests 200
    python -m benchmarks.serving compare
    python -m benchmarks.serving plot benchmarks/results/FILE

`run` puts one load after the other on the server and writes one JSON file; `compare` prints the
table of result files, and `plot` draws them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks import results
from benchmarks.machine import (
    describe_commit,
    describe_machine,
    describe_versions,
    read_cpu_seconds,
)
from benchmarks.serving.conversations import Mix, arrivals
from benchmarks.serving.fake_server import serve_fake
from benchmarks.serving.journal import Journal
from benchmarks.serving.load import Load, Target, closed_loop, open_loop
from benchmarks.serving.processes import read_cpu
from benchmarks.serving.summary import Record, summarise, summarise_fake, table

_WARM_UP = 64
"""Most conversations that run, unmeasured, before the first load."""


def main(words: list[str] | None = None) -> None:
    """Run the command line."""
    options = _parse(words)
    try:
        options.action(options)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"benchmarks.serving: {error}")


def run(options: argparse.Namespace) -> None:
    """Put every load on the server and write the file."""
    started = datetime.now(UTC)
    out = options.out or results.FOLDER / f"serving-{started:%Y%m%d-%H%M%S}.json"
    document: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.serving", *options.words]),
        "started": started.isoformat(timespec="seconds"),
        "commit": describe_commit(),
        "machine": describe_machine(),
        "versions": describe_versions(),
    }
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="tl-") as folder:
        fake = None
        if options.fake is not None:
            fake = stack.enter_context(serve_fake(options.fake, Path(folder) / "server.log"))
        target = _target(options, fake)
        pid = fake["pid"] if fake else options.server_pid
        document["server"] = fake or {"url": options.target, "model": target.model}
        document["records"] = list(_records(options, target, fake, pid))
    results.write(document, out)
    print(f"{out}\n{table(document['records'])}")


def _records(
    options: argparse.Namespace, target: Target, fake: dict[str, Any] | None, pid: int | None
) -> Iterator[Record]:
    """Measure one load after the other."""
    mix = Mix(
        tuple(options.input), tuple(options.output), options.turns, options.prefix, options.prefixes
    )
    kind, levels = ("rate", options.rate) if options.rate else ("clients", options.clients)
    most = int(min(max(levels), _WARM_UP))
    warm_up = asyncio.run(closed_loop(target, mix.draw(options.seed - 1), most, most))
    if all(errors := [sent.answer().error for sent in warm_up.sent]):
        raise RuntimeError(f"no request of the warm-up succeeded: {errors[0]}")
    counts = _counts(options.requests, levels)
    for level, count in zip(levels, counts, strict=True):
        name = f"{level:g} {'client' if kind == 'clients' else 'arrival/s'}"
        load, usage = _measure(options, target, mix, kind, level, count, pid)
        answers = [sent.answer() for sent in load.sent]
        record = {"load": name, kind: level, **summarise(load, answers), **usage}
        _price(record)
        if fake is not None:
            record |= summarise_fake(load, answers, Journal(Path(fake["journal"])))
            _add_offered(record, fake)
        print(f"{name}: {record['output_tok_s']:,.0f} tok/s", file=sys.stderr)
        yield record


def _measure(
    options: argparse.Namespace,
    target: Target,
    mix: Mix,
    kind: str,
    level: float,
    count: int,
    pid: int | None,
) -> tuple[Load, Record]:
    """Run one load; with it the CPU seconds spent meanwhile, by role, and the disturbance."""
    machine, own = read_cpu_seconds()
    server = read_cpu(pid) if pid else {}
    begin = time.monotonic()
    conversations = mix.draw(options.seed)
    if kind == "clients":
        load = asyncio.run(closed_loop(target, conversations, int(level), count))
    else:
        times = arrivals(level, options.burst, options.seed)
        load = asyncio.run(open_loop(target, conversations, times, count))
    seconds = time.monotonic() - begin
    machine, own = (b - a for a, b in zip((machine, own), read_cpu_seconds(), strict=True))
    after = read_cpu(pid) if pid else {}
    cpu = {role: after[role] - server[role] for role in server} | {"client": own}
    others = machine - sum(cpu.values())
    disturbance = max(0.0, others / (seconds * (os.cpu_count() or 1)))
    return load, {
        "cpu_s": {role: round(value, 2) for role, value in cpu.items()},
        "disturbance": round(disturbance, 3) if pid else None,
    }


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


def _target(options: argparse.Namespace, fake: dict[str, Any] | None) -> Target:
    """Where the load goes; a server's first model unless one is named."""
    url = urlsplit(fake["url"] if fake else options.target)
    if url.scheme != "http" or url.hostname is None:
        raise ValueError(f"--target must be like http://HOST:PORT, not {options.target}")
    key = os.environ.get("OPENAI_API_KEY")
    model = fake["model"] if fake else options.model or _first_model(options.target, key)
    return Target(
        host=url.hostname,
        port=url.port or 80,
        model=model,
        path=f"{url.path.rstrip('/')}/v1/completions",
        api_key=key,
        timeout_s=options.timeout,
        temperature=options.temperature,
    )


def _first_model(url: str, key: str | None) -> str:
    request = urllib.request.Request(f"{url.rstrip('/')}/v1/models")
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    # No proxy: the environment's `http_proxy` would be asked even for this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=10) as response:
        return str(json.load(response)["data"][0]["id"])


def compare(options: argparse.Namespace) -> None:
    """Print the tables of the given result files, or of the newest one."""
    files = options.files or sorted(results.FOLDER.glob("serving-*.json"))[-1:]
    if not files:
        raise FileNotFoundError("there is no result file yet; `run` writes one")
    for file in files:
        document = results.read(file)
        print(f"{file.name}: {document['command']}\n\n{table(document['records'])}\n")


def plot(options: argparse.Namespace) -> None:
    """Draw result files, as PNG and SVG."""
    from benchmarks.serving.plots import plot_serving

    documents = {file.stem: results.read(file) for file in options.files}
    for file in plot_serving(documents, options.images):
        print(file)


def _parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.serving", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("run", help="measure and write a result file")
    measuring.set_defaults(action=run, words=sys.argv[1:] if words is None else words)
    _add_server_options(measuring)
    _add_load_options(measuring)
    comparing = commands.add_parser("compare", help="print the table of result files")
    comparing.set_defaults(action=compare)
    comparing.add_argument("files", nargs="*", type=Path, help="the newest if none is named")
    plotting = commands.add_parser("plot", help="draw result files")
    plotting.set_defaults(action=plot)
    plotting.add_argument("files", nargs="+", type=Path)
    images = Path(__file__).parents[2] / "docs" / "images"
    plotting.add_argument("--images", type=Path, default=images, help="folder to draw into")
    return parser.parse_args(words)


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    server = parser.add_mutually_exclusive_group(required=True)
    server.add_argument("--target", metavar="URL", help="of a server with OpenAI's API")
    server.add_argument(
        "--fake",
        nargs="*",
        metavar="NAME=VALUE",
        help="start this project's server with fake engines; options of benchmarks.serving.fake",
    )
    parser.add_argument("--model", help="the server's first one if unset")
    parser.add_argument(
        "--server-pid",
        type=int,
        help="of a server on this machine: CPU time of it and its children",
    )


def _add_load_options(parser: argparse.ArgumentParser) -> None:
    load = parser.add_mutually_exclusive_group()
    clients = [1, 16, 64, 256, 512]
    load.add_argument("--clients", type=int, nargs="+", default=clients, help="closed loops")
    load.add_argument("--rate", type=float, nargs="+", help="open loops: arrivals a second")
    parser.add_argument("--burst", type=int, default=1, help="conversations that arrive together")
    parser.add_argument(
        "--requests", type=int, nargs="+", help="conversations: of all loads, or of each"
    )
    parser.add_argument(
        "--input", type=int, nargs=2, default=[160, 480], help="least and most tokens of a turn"
    )
    parser.add_argument(
        "--output", type=int, nargs=2, default=[128, 384], help="least and most tokens of an answer"
    )
    parser.add_argument("--turns", type=int, default=1, help="of a conversation")
    parser.add_argument("--prefix", type=int, default=0, help="tokens all conversations begin with")
    parser.add_argument("--prefixes", type=int, default=1, help="different such beginnings")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one answer")
    parser.add_argument("--seed", type=int, default=0, help="of texts, lengths and arrivals")
    parser.add_argument("--out", type=Path, help="file to write, in benchmarks/results if unset")


if __name__ == "__main__":
    main()
