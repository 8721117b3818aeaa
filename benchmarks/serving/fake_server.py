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


@contextmanager
def serve_fake(settings: Iterable[str], log: Path) -> Iterator[dict[str, Any]]:
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
            yield json.loads(line)
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
