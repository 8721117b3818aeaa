"""This project's server over HTTP beside its own engine offline, with dummy weights of a shape.

    python -m benchmarks.serving.http_table --model qwen2.5-7b

Starts the server as users do, puts one closed loop after the other on it, ends it, and gives the
same requests to `LLM.generate`. Writes one JSON file, anew after each part, and prints its table.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks import results
from benchmarks.engines import EngineSpec
from benchmarks.machine import describe_run
from benchmarks.models import find_model
from benchmarks.serving.goals import http_table
from benchmarks.serving.launched import Launched, launch, server_config
from benchmarks.serving.shape_tokenizer import write_model

_ROOT = Path(__file__).parents[2]
_INPUT, _OUTPUT = (160, 480), (128, 384)
_WARM_UP_OUTPUT = (8, 16)
_WARM_UP_SEED = 1_000_001
_REQUESTS = {1: 12, 16: 96, 64: 320, 256: 1280, 512: 2048}
"""Clients → requests."""
_PORTS = range(20_000, 30_000)
"""None of which the system gives to whoever asks for any."""


def main(words: list[str] | None = None) -> None:
    """Run the command line."""
    options = _parse(words)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with tempfile.TemporaryDirectory(prefix="tl-") as folder:
            run(options, Path(folder))
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        sys.exit(f"benchmarks.serving.http_table: {error}")
    except KeyboardInterrupt:
        sys.exit("benchmarks.serving.http_table: interrupted; the result file has what was done")


def run(options: argparse.Namespace, folder: Path) -> None:
    """Measure, and write the file after each part.

    Args:
        options: of the command line.
        folder: for what is needed only meanwhile.

    Raises:
        RuntimeError: the server did not start.
        ValueError: the model has no room for a tokenizer, or options contradict each other.
    """
    started = datetime.now(UTC)
    out = options.out or results.FOLDER / f"http-{started:%Y%m%d-%H%M%S}.json"
    levels = _levels(options.clients, options.requests)
    shape = find_model(options.model)
    model = write_model(Path(shape), folder / "model")
    engine = {"load_format": "dummy", **EngineSpec.parse(f"trunkline:{options.engine}").options}
    document: dict[str, Any] = {
        **describe_run("benchmarks.serving.http_table", options.words, started),
        "model": Path(options.model).name,
        "engine": engine,
        "temperature": options.temperature,
        "records": [],
        "offline": [],
        "failed": [],
    }
    try:
        for part, value in _measure(options, levels, engine, shape, model, folder):
            if isinstance(document.get(part), list):
                document[part].append(value)
            else:
                document[part] = value
            results.write(document, out)
            print(f"{datetime.now(UTC) - started}: {part}", file=sys.stderr, flush=True)
    finally:
        print(f"{out}\n{http_table(document)}", flush=True)
    if document["failed"]:
        raise RuntimeError(f"these parts failed: {document['failed']}")


def _measure(
    options: argparse.Namespace,
    levels: list[tuple[int, int]],
    engine: dict[str, Any],
    shape: str,
    model: Path,
    folder: Path,
) -> Iterator[tuple[str, Any]]:
    """Yield what becomes known, with its key in the result file."""
    log = (options.logs or folder) / "server.log"
    port = random.choice(_PORTS)
    config = server_config(Path(shape).name, engine | {"model": str(model)}, port)
    if options.served:
        with launch(config, folder, log, options.start_limit) as server:
            yield "server", {"start_seconds": server.start_seconds, "config": config}
            most = max(clients for clients, _ in levels)
            _load(options, server, most, most, _WARM_UP_OUTPUT, _WARM_UP_SEED, folder)
            for index, (clients, count) in enumerate(levels):
                load = (clients, count, _OUTPUT, _seed(index))
                yield _try("records", _load, options, server, *load, folder)
    for index, (clients, count) in enumerate(levels):
        if clients in options.offline:
            job = {
                "engine": engine | {"model": shape},
                "tokenizer": str(model / "tokenizer.json"),
                "input": _INPUT,
                "output": _OUTPUT,
                "seed": _seed(index),
                "requests": count,
                "clients": clients,
                "temperature": options.temperature,
            }
            yield _try("offline", _python, "benchmarks.serving.reference", json.dumps(job))


def _try(part: str, action: Callable[..., Any], *arguments: Any) -> tuple[str, Any]:
    """`part` and what came of it; or `failed`, as the parts after it may be well."""
    try:
        return part, action(*arguments)
    except subprocess.CalledProcessError as error:
        return "failed", shlex.join(error.cmd)


def _load(
    options: argparse.Namespace,
    server: Launched,
    clients: int,
    count: int,
    output: tuple[int, int],
    seed: int,
    folder: Path,
) -> Any:
    """The record of one closed loop; its client is a process of its own."""
    out = folder / "load.json"
    words = [
        "run",
        *("--target", server.url, "--server-pid", server.pid, "--out", out),
        *("--clients", clients, "--requests", count, "--seed", seed),
        *("--input", *_INPUT, "--output", *output),
        *("--temperature", options.temperature, "--timeout", options.timeout),
    ]
    _python("benchmarks.serving", *map(str, words))
    return results.read(out)["records"][0]


def _python(module: str, *words: str) -> Any:
    """Run a module; returns the JSON of its last line, or None if that is something else."""
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True, check=True)
    last = done.stdout.strip().rpartition("\n")[2]
    return json.loads(last) if last.startswith("{") else None


def _seed(index: int) -> int:
    """Each loop has prompts of its own, or the prefix cache would know them; the loads' own
    warm-ups draw by the number before."""
    return 2 * index + 1


def _levels(clients: list[int], requests: list[int] | None) -> list[tuple[int, int]]:
    """Clients and requests of each loop.

    Raises:
        ValueError: there are not as many of the one as of the other.
    """
    if requests is None:
        return [(n, _REQUESTS.get(n, max(12, 5 * n))) for n in clients]
    if len(requests) != len(clients):
        raise ValueError(f"--requests must have {len(clients)} values, one for each of --clients")
    return list(zip(clients, requests, strict=True))


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # `timeout` sends it twice; the server must be ended
    raise KeyboardInterrupt


def _parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.serving.http_table", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(words=sys.argv[1:] if words is None else words)
    parser.add_argument("--model", default="qwen2.5-7b", help="a shape, or a folder with one")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64, 256, 512])
    parser.add_argument(
        "--requests", type=int, nargs="+", help=f"of each loop; {_REQUESTS}, else five a client"
    )
    parser.add_argument(
        "--offline",
        type=int,
        nargs="*",
        default=[256, 512],
        help="which of --clients the engine alone is measured with, as its max_num_seqs",
    )
    parser.add_argument(
        "--served", action=argparse.BooleanOptionalAction, default=True, help="measure the server"
    )
    parser.add_argument(
        "--engine", default="", metavar="OPTION=VALUE,…", help="of server and reference alike"
    )
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one answer")
    parser.add_argument("--start-limit", type=float, default=120.0, help="seconds for the start")
    parser.add_argument("--logs", type=Path, help="folder that gets the server's log")
    parser.add_argument("--out", type=Path, help="file to write, in benchmarks/results if unset")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
