"""Starts and ends a server with fake engines, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
