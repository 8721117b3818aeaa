"""Long prompts that are prepared beside streams: what they do to the time between tokens.

    python -m benchmarks.serving.long_prompts

Starts this project's server with a fake engine. The prompts are longer than the model takes, but
not so long that the server sees it before it has their tokens: so all that they cost is what is
measured, which is to read, check and tokenize them.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.machine import describe_run
from benchmarks.serving.beside import Record, median_itl, run_streams
from benchmarks.serving.conversations import Mix
from benchmarks.serving.fake_server import fake_target, serve_fake
from benchmarks.serving.load import Target


class LongPrompts:
    """Clients that send long prompts, one after the other, while this is entered.

    Args:
        target: the server.
        clients: how many.
        tokens: of a prompt.
        chat: send it as a chat instead of a text.
    """

    def __init__(self, target: Target, clients: int, tokens: int, *, chat: bool) -> None:
        text = next(Mix((tokens, tokens), (1, 1)).draw(0)).turns[0].text
        prompt = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        self._path = "/v1/chat/completions" if chat else target.path
        self._body = json.dumps({"model": target.model, "max_tokens": 1, **prompt}).encode()
        self._target = target
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(clients)]
        self.seconds: list[float] = []
        """How long the answers took."""
        self.statuses: set[int] = set()

    def __enter__(self) -> LongPrompts:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        connection = http.client.HTTPConnection(self._target.host, self._target.port, timeout=60)
        headers = {"Content-Type": "application/json"}
        while not self._ended.is_set():
            begin = time.monotonic()
            connection.request("POST", self._path, self._body, headers)
            response = connection.getresponse()
            response.read()
            self.seconds.append(time.monotonic() - begin)
            self.statuses.add(response.status)
        connection.close()


def main(words: list[str] | None = None) -> None:
    """Run the command line."""
    options = _parse(words)
    started = datetime.now(UTC)
    out = options.out or results.FOLDER / f"serving-long-prompts-{started:%Y-%m-%d}.json"
    runs = list(_measure(options))
    document: dict[str, Any] = {
        **describe_run("benchmarks.serving.long_prompts", options.words, started),
        "itl_ms": median_itl(runs, "beside"),
        "records": runs,
    }
    results.write(document, out)
    print(f"{out}\nITL in ms: {json.dumps(document['itl_ms'], indent=2)}")


def _measure(options: argparse.Namespace) -> Iterator[Record]:
    with (
        tempfile.TemporaryDirectory(prefix="tl-") as folder,
        serve_fake([f"step-ms={options.step_ms:g}"], Path(folder) / "server.log") as fake,
    ):
        target = fake_target(fake)
        tokens = round(options.seconds * 1e3 / options.step_ms)
        for _ in range(options.repeat):
            for name in ("nothing", "texts", "chats"):
                clients = 0 if name == "nothing" else options.clients
                long = LongPrompts(target, clients, options.tokens, chat=name == "chats")
                with long:
                    run = run_streams(target, fake["pid"], options.streams, tokens, options.seed)
                answers = {"prompts": len(long.seconds), "statuses": sorted(long.statuses)}
                if long.seconds:
                    answers["seconds_each"] = round(sum(long.seconds) / len(long.seconds), 3)
                print(f"beside {name}: {run['itl_ms']}, {answers}", file=sys.stderr)
                yield {"beside": name, **answers, **run}


def _parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.serving.long_prompts", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(words=sys.argv[1:] if words is None else words)
    parser.add_argument("--streams", type=int, default=16, help="normal ones")
    parser.add_argument("--seconds", type=float, default=10.0, help="that they last")
    parser.add_argument("--clients", type=int, default=1, help="that send long prompts")
    parser.add_argument("--tokens", type=int, default=25_000, help="of a long prompt")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--step-ms", type=float, default=25.0, help="time of an engine's step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file to write, in benchmarks/results if unset")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
