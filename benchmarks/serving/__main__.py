"""Measures a server over HTTP: latencies, speed, errors, and where its CPU time goes.

    python -m benchmarks.serving run --fake --clients 128 --input 16 32 --output 400 400
    python -m benchmarks.serving run --target http://127.0.0.1:8000 --clients 1 16 64 256
    python -m benchmarks.serving run --target http://127.0.0.1:8000 --rate 4 8 --requests 200
    python -m benchmarks.serving multi-turn
    python -m benchmarks.serving overload
    python -m benchmarks.serving compare
    python -m benchmarks.serving plot benchmarks/results/FILE

`run` puts one load after the other on the server and writes one JSON file; `multi-turn` has the
same chats with fake engines under each routing policy; `overload` asks more of fake engines than
they can do; `compare` prints the table of result files, and `plot` draws them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import urllib.request
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks import results
from benchmarks.machine import describe_run
from benchmarks.serving import multi_turn, overload
from benchmarks.serving.fake_server import fake_settings, serve_fake
from benchmarks.serving.load import Target
from benchmarks.serving.measure import measure
from benchmarks.serving.summary import table

_TABLES = {"policy": multi_turn.table, "refused": overload.table}
"""Key that only records of one kind have → their table."""


def main(words: list[str] | None = None) -> None:
    """Run the command line."""
    options = _parse(words)
    try:
        options.action(options)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"benchmarks.serving: {error}")


def run(options: argparse.Namespace) -> None:
    """Put every load on the server and write the file."""
    document, out = _begin(options, "serving")
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="tl-") as folder:
        fake = None
        if options.fake is not None:
            fake = stack.enter_context(serve_fake(options.fake, Path(folder) / "server.log"))
        target = _target(options, fake)
        pid = fake["pid"] if fake else options.server_pid
        document["server"] = fake or {"url": options.target, "model": target.model}
        document["records"] = list(measure(options, target, fake, pid))
    results.write(document, out)
    print(f"{out}\n{table(document['records'])}")


def compare_policies(options: argparse.Namespace) -> None:
    """Have chats with fake engines under each policy and write the file."""
    document, out = _begin(options, "serving-multi-turn")
    document["server"] = {"fake": fake_settings(multi_turn.SETTINGS, options.fake)}
    document["records"] = list(multi_turn.measure(options))
    results.write(document, out)
    print(f"{out}\n{multi_turn.table(document['records'])}")


def overload_engines(options: argparse.Namespace) -> None:
    """Ask more of fake engines than they can do and write the file."""
    document, out = _begin(options, "serving-overload")
    document["server"] = {"fake": fake_settings(overload.SETTINGS, options.fake)}
    document["records"] = list(overload.measure(options))
    results.write(document, out)
    print(f"{out}\n{overload.table(document['records'])}")


def _begin(options: argparse.Namespace, name: str) -> tuple[dict[str, Any], Path]:
    """The head of a result file, and where it goes."""
    started = datetime.now(UTC)
    out = options.out or results.FOLDER / f"{name}-{started:%Y%m%d-%H%M%S}.json"
    return describe_run("benchmarks.serving", options.words, started), out


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
        records = document["records"]
        draw = next((draw for key, draw in _TABLES.items() if key in records[0]), table)
        print(f"{file.name}: {document['command']}\n\n{draw(records)}\n")


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
    chatting = commands.add_parser("multi-turn", help="compare routing policies")
    chatting.set_defaults(action=compare_policies, words=measuring.get_default("words"))
    multi_turn.add_options(chatting)
    overloading = commands.add_parser("overload", help="ask more of engines than they can do")
    overloading.set_defaults(action=overload_engines, words=measuring.get_default("words"))
    overload.add_options(overloading)
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
    parser.add_argument("--driver", choices=("own", "guidellm"), default="own")
    parser.add_argument("--guidellm", default="guidellm", metavar="COMMAND", help="how to call it")
    parser.add_argument("--turns", type=int, default=1, help="of a conversation")
    parser.add_argument("--prefix", type=int, default=0, help="tokens all conversations begin with")
    parser.add_argument("--prefixes", type=int, default=1, help="different such beginnings")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one answer")
    parser.add_argument("--seed", type=int, default=0, help="of texts, lengths and arrivals")
    parser.add_argument("--out", type=Path, help="file to write, in benchmarks/results if unset")


if __name__ == "__main__":
    main()
