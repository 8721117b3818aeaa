"""Clients that read a byte a second: what they do to the others, and to the server's memory.

    python -m benchmarks.serving.slow_reader

Starts this project's server with a fake engine, on each set of flags, and measures the time between
the tokens of normal streams beside none, one and several slow readers. At the end these read on at
full speed, which shows that they have held the server up: what it could not write it has merged.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import results
from benchmarks.machine import describe_run
from benchmarks.serving.answers import bodies, events
from benchmarks.serving.beside import Record, median_itl, run_streams
from benchmarks.serving.client import Exchange
from benchmarks.serving.conversations import Mix, count_words, echo
from benchmarks.serving.fake_server import fake_target, serve_fake
from benchmarks.serving.leaving import END, seconds_until_free
from benchmarks.serving.load import Target

_PAUSE_S = 1.0
"""Between two bytes."""
_RECEIVE_BUFFER = 4096
"""Bytes; the kernel doubles it."""
_HURRY_S = 5.0
"""How long slow readers read at full speed in the end."""
_FREE_LIMIT_S = 60.0


class SlowReader:
    """A streamed completion of which a thread reads one byte a second, until told to hurry.

    Args:
        target: the server.
        prompt: of words that are one token each.
        choices: completions of the prompt, which come all on this one connection.
        tokens: of each.
    """

    def __init__(self, target: Target, prompt: str, choices: int, tokens: int) -> None:
        self._prompt = prompt
        self._received: list[bytes] = []
        self._hurry = threading.Event()
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        self._socket.connect((target.host, target.port))
        self._socket.sendall(_request(target, prompt, choices, tokens))
        self._thread = threading.Thread(target=self._dawdle, daemon=True)
        self._thread.start()

    def _dawdle(self) -> None:
        while not self._hurry.wait(_PAUSE_S):
            self._received.append(self._socket.recv(1))

    def hurry(self, seconds: float) -> None:
        """Read at full speed, at most for this long."""
        self._hurry.set()
        self._thread.join()
        self._socket.settimeout(0.2)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not b"".join(self._received[-5:]).endswith(END):
            with contextlib.suppress(TimeoutError):
                if not (data := self._socket.recv(65536)):
                    break
                self._received.append(data)

    def leave(self) -> None:
        """End the connection."""
        self._hurry.set()
        self._thread.join()
        self._socket.close()

    def judge(self) -> Record:
        """What came: whether each completion's text is right as far as it goes, how many bytes had
        been written before the server had to wait, and the most tokens of an event since."""
        texts: dict[int, str] = {}
        size, before, most = 0, None, 0
        for text, index, length in self._events():
            texts[index] = texts.get(index, "") + text
            most = max(most, count_words(text))
            before = size if before is None and count_words(text) > 2 else before
            size += length
        right = all(text == echo(self._prompt, count_words(text)) for text in texts.values())
        tokens = sum(map(count_words, texts.values()))
        return {
            "right": bool(texts) and right,
            "tokens": tokens,
            "bytes_before_merging": before,
            "most_tokens_merged": most,
        }

    def _events(self) -> Iterator[tuple[str, int, int]]:
        """Text, completion and size of each event, to the last whole one."""
        body = b"".join(self._received).partition(b"\r\n\r\n")[2]
        exchange = Exchange(0.0, chunked=True, pieces=[(0.0, body)])
        with contextlib.suppress(ValueError):  # the last chunk is cut
            for _, data in events(bodies(exchange)):
                for choice in json.loads(data)["choices"]:
                    yield choice["text"], choice["index"], len(data)


def _request(target: Target, prompt: str, choices: int, tokens: int) -> bytes:
    fields = {"model": target.model, "prompt": prompt, "max_tokens": tokens, "n": choices}
    body = json.dumps({**fields, "stream": True, "ignore_eos": True}).encode()
    head = f"POST {target.path} HTTP/1.1\r\nHost: {target.host}\r\nContent-Length: {len(body)}"
    return f"{head}\r\nContent-Type: application/json\r\n\r\n".encode() + body


def main(words: list[str] | None = None) -> None:
    """Run the command line."""
    options = _parse(words)
    started = datetime.now(UTC)
    out = options.out or results.FOLDER / f"serving-slow-reader-{started:%Y-%m-%d}.json"
    document = describe_run("benchmarks.serving.slow_reader", options.words, started)
    records = []
    for flags in options.flags:
        runs = list(_compare(options, flags))
        records += runs
        document[f"{flags}_flags_itl_ms"] = median_itl(runs, "slow_readers")
        print(f"{flags} flags, ITL by slow readers: {document[f'{flags}_flags_itl_ms']}")
    results.write({**document, "records": records}, out)
    print(out)


def _compare(options: argparse.Namespace, flags: str) -> Iterator[Record]:
    settings = [f"flags={flags}", f"step-ms={options.step_ms:g}"]
    with (
        tempfile.TemporaryDirectory(prefix="tl-") as folder,
        serve_fake(settings, Path(folder) / "server.log") as fake,
    ):
        target = fake_target(fake)
        for _ in range(options.repeat):
            for number in options.slow:
                run = {"flags": flags, **_measure(options, target, fake["pid"], number)}
                print(f"{flags} flags, {number} slow: {run}", file=sys.stderr)
                yield run


def _measure(options: argparse.Namespace, target: Target, pid: int, number: int) -> Record:
    """One run of the normal streams, begun when the slow readers hold the server up."""
    prompt = next(Mix((100, 100), (1, 1)).draw(options.seed)).turns[0].text
    tokens = round((options.fill + 3 * options.seconds) * 1e3 / options.step_ms)
    slow = [SlowReader(target, prompt, options.choices, tokens) for _ in range(number)]
    try:
        time.sleep(options.fill if slow else 1.0)
        count = round(options.seconds * 1e3 / options.step_ms)
        run = run_streams(target, pid, options.streams, count, options.seed)
        for reader in slow:
            reader.hurry(_HURRY_S)
    finally:
        for reader in slow:
            reader.leave()
    free_after_s = seconds_until_free(target, _FREE_LIMIT_S)
    return {
        "slow_readers": number,
        **run,
        "free_after_s": round(free_after_s, 3),
        "slow": [reader.judge() for reader in slow],
    }


def _parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.serving.slow_reader", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(words=sys.argv[1:] if words is None else words)
    parser.add_argument("--slow", type=int, nargs="+", default=[0, 1, 8], help="slow readers")
    parser.add_argument("--streams", type=int, default=63, help="normal ones")
    parser.add_argument("--seconds", type=float, default=15.0, help="that normal streams last")
    parser.add_argument(
        "--fill", type=float, default=40.0, help="seconds until all buffers are full"
    )
    parser.add_argument("--choices", type=int, default=16, help="completions of a slow reader")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--step-ms", type=float, default=25.0, help="time of an engine's step")
    choices = ("fast", "default")
    parser.add_argument("--flags", nargs="+", choices=choices, default=choices)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file to write, in benchmarks/results if unset")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
