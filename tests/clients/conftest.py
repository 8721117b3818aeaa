"""The bundled model as `make serve` has it, for clients that live in a venv of their own.

The clients' needs and the server's would not get along in one venv, and the clients must not see
the server's code. Without a venv of theirs there is nothing here to collect.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
MODEL = "smollm2-135m-instruct"
KEY, LIMITED_KEY = "sk-for-tests", "sk-one-a-minute"
START_TIMEOUT_S = 240
STOP_TIMEOUT_S = 120

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks for one on the internet
if importlib.util.find_spec("litellm") is None:
    collect_ignore_glob = ["test_*.py"]


@dataclass(frozen=True)
class Server:
    """What clients are told of the server."""

    url: str
    model: str = MODEL
    key: str = KEY
    limited_key: str = LIMITED_KEY
    """Takes one request a minute."""

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"

    def running(self) -> int:
        """Requests that engines hold, as of their last reports."""
        with urllib.request.urlopen(f"{self.url}/health", timeout=10) as response:
            engines: list[dict[str, Any]] = json.load(response)["engines"]
        return sum(engine["running"] + engine["waiting"] for engine in engines)

    def wait_for(self, count: int, timeout_s: float = 30) -> None:
        """Wait until engines hold so many requests."""
        deadline = time.monotonic() + timeout_s
        while (found := self.running()) != count:
            assert time.monotonic() < deadline, f"{found} requests run, not {count}"
            time.sleep(0.1)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    port = random.randrange(20_000, 30_000)  # the system gives none of these to others
    log = folder / "server.log"
    process = subprocess.Popen(
        [
            os.environ.get("TRUNKLINE_PYTHON", str(ROOT / ".venv/bin/python")),
            *("-m", "deployments.launch", str(write_config(folder, port))),
        ],
        cwd=os.environ.get("TRUNKLINE_ROOT", ROOT),
        env={k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTEST_"))},
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )
    try:
        wait_until_ready(process, log)
        yield Server(f"http://127.0.0.1:{port}")
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.wait(STOP_TIMEOUT_S)


def write_config(folder: Path, port: int) -> Path:
    """The default configuration, on a port of its own and with API keys."""
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    config["http_options"]["port"] = port
    args = config["applications"][0]["args"]
    args["models"][MODEL]["engine"] |= {"kv_cache_memory_bytes": 512 * 2**20}
    keys = folder / "api-keys"
    keys.touch(0o600)
    keys.write_text(f"{KEY}\n{LIMITED_KEY} requests_per_minute=1\n")
    args["ingress"] |= {"api_keys_file": str(keys)}
    path = folder / "serve_config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while "trunkline: ready in" not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"the server is not ready; it said:\n{log.read_text()[-6000:]}")
        time.sleep(0.2)


@pytest.fixture(autouse=True)
def idle(server: Server) -> Iterator[None]:
    """Whatever a client did, nothing of it goes on."""
    yield
    server.wait_for(0)
