"""Starts and ends a server as users do, `python -m deployments.launch`, around one model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]
_LOOK_S = 0.2
_LOG_TAIL = 3000
_END_LIMIT_S = 40.0


@dataclass(frozen=True)
class Launched:
    """A server that answers."""

    url: str
    pid: int
    """Of the launcher; all processes of the server descend from it."""
    start_seconds: float
    """From the launcher's start to the first `/health` that says `ok`."""


def server_config(name: str, engine: dict[str, Any], port: int) -> dict[str, Any]:
    """Configuration of a server on this machine with one engine; what is not given is as shipped.

    Args:
        name: by which clients call the model.
        engine: fields of `EngineConfig`.
        port: of HTTP.
    """
    quick_end = {"graceful_shutdown_timeout_s": 1}
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "127.0.0.1", "port": port, "keep_alive_timeout_s": 90},
        "logging_config": {"enable_access_log": False},
        "applications": [
            {
                "name": "trunkline",
                "route_prefix": "/",
                "import_path": "deployments.app:build",
                "args": {
                    "models": {name: {"engine": engine, "deployment": quick_end}},
                    "ingress": quick_end,
                },
            }
        ],
    }


@contextmanager
def launch(config: dict[str, Any], folder: Path, log: Path, limit_s: float) -> Iterator[Launched]:
    """Start a server, yield it once it is ready, and end it with all of its processes.

    Args:
        config: as from `server_config`.
        folder: gets the configuration file.
        log: gets what the server writes.
        limit_s: seconds that the start may take.

    Raises:
        RuntimeError: it ended instead of starting, or took too long.
    """
    file = folder / "serve_config.yaml"
    file.write_text(json.dumps(config))  # JSON is YAML
    url = f"http://127.0.0.1:{config['http_options']['port']}"
    begin = time.monotonic()
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "deployments.launch", str(file)],
            cwd=_ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        while not _is_ready(url):
            if server.poll() is not None or time.monotonic() - begin > limit_s:
                raise RuntimeError(f"the server did not start; {log} ends:\n{_tail(log)}")
            time.sleep(_LOOK_S)
        yield Launched(url, server.pid, round(time.monotonic() - begin, 1))
    finally:
        _end(server)


def _is_ready(url: str) -> bool:
    # No proxy: the environment's `http_proxy` would be asked even for this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/health", timeout=5) as response:
            return bool(json.load(response)["status"] == "ok")
    except (OSError, ValueError, KeyError):
        return False


def _end(server: subprocess.Popen[bytes]) -> None:
    """Ask the launcher to end its server; ask again, which makes it kill the server; kill it."""
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGKILL):
        if server.poll() is None:
            server.send_signal(number)
            try:
                server.wait(_END_LIMIT_S)
            except subprocess.TimeoutExpired:
                continue


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-_LOG_TAIL:]
