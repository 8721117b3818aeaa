"""Starts and ends a server with fake engines, in a process of its own."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.serving.load import Target

_ROOT = Path(__file__).parents[2]
_END_LIMIT_S = 60.0


class FakeServer(dict[str, Any]):
    """The line by which a server said that it is ready, and a way to talk to it."""

    def __init__(self, ready: dict[str, Any], process: subprocess.Popen[str]) -> None:
        super().__init__(ready)
        self._process = process

    def redeploy(self, **options: Any) -> None:
        """Bring the application to other options, by a rolling update, and wait for its end.

        Args:
            options: those that change, by their names in this dictionary.

        Raises:
            RuntimeError: the server has ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(options) + "\n")
        self._process.stdin.flush()
        if not self._process.stdout.readline():
            raise RuntimeError("the fake server has ended")


@contextmanager
def serve_fake(settings: Iterable[str], log: Path) -> Iterator[FakeServer]:
    """Run `python -m benchmarks.serving.fake` and yield the line by which it says it is ready.

    Args:
        settings: its options, as `name=value`.
        log: gets what the server writes.

    Raises:
        RuntimeError: it did not start.
    """
    words = [f"--{setting}" for setting in settings]
    with (
        log.open("w") as file,
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.serving.fake", *words],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        ) as server,
    ):
        assert server.stdin is not None and server.stdout is not None
        try:
            line = server.stdout.readline()
            if not line:
                raise RuntimeError(f"the fake server did not start:\n{log.read_text()[-3000:]}")
            yield FakeServer(json.loads(line), server)
        finally:
            server.stdin.close()
            server.wait(_END_LIMIT_S)


def add_fake_option(parser: argparse.ArgumentParser, usual: dict[str, str]) -> None:
    """Add `--fake`, for what `fake_settings` takes beside the usual settings."""
    parser.add_argument(
        "--fake",
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help=f"options of benchmarks.serving.fake beside {' '.join(fake_settings(usual, []))}",
    )


def fake_settings(usual: dict[str, str], changed: Iterable[str]) -> list[str]:
    """Settings for `serve_fake`: the usual ones, some of them changed or added as `name=value`.

    Raises:
        ValueError: one is not like that.
    """
    pairs = [setting.partition("=") for setting in changed]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        raise ValueError(f"--fake takes name=value, not {wrong}")
    settings = usual | {name: value for name, _, value in pairs}
    return [f"{name}={value}" for name, value in settings.items()]


def fake_target(fake: dict[str, Any]) -> Target:
    """Where the load of a server that `serve_fake` started goes."""
    url = urlsplit(fake["url"])
    return Target(url.hostname or "", url.port or 80, fake["model"])
