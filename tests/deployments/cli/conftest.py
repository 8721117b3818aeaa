"""A server on a port of this machine, around a core that repeats the prompt."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import uvicorn

from deployments.cli.local_app import open_local_app
from deployments.config import ModelOptions
from deployments.ports import pick_port
from tests.deployments.fake_core import FakeCore

MODEL = "m"


@contextmanager
def serve_fake(**fake: float) -> Iterator[str]:
    """Serve in a thread; gives the URL. What stands in `<think>` counts as thinking."""
    model = ModelOptions(reasoning_parser="qwen3")
    port = pick_port()
    ready = threading.Event()
    servers: list[uvicorn.Server] = []

    async def main() -> None:
        async with open_local_app(MODEL, model, partial(FakeCore, **fake)) as app:
            config = uvicorn.Config(app, port=port, log_level="warning", lifespan="off")
            servers.append(uvicorn.Server(config))
            task = asyncio.ensure_future(servers[0].serve())
            while not servers[0].started:
                await asyncio.sleep(0.01)
            ready.set()
            await task

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert ready.wait(30)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        servers[0].should_exit = True
        thread.join(30)


# Not for the session: tests elsewhere change what its engine's idle loop and watchdogs go by, and
# then these end the process. And it logs of a slow machine where others count lines.
@pytest.fixture(scope="package")
def url() -> Iterator[str]:
    with serve_fake() as address:
        yield address


@pytest.fixture
def write_lines(tmp_path: Path):
    def write(*lines: bytes) -> Path:
        path = tmp_path / "in.jsonl"
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return write
