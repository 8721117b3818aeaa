"""Steps that hang and processes that are stopped, on a real Ray cluster: nothing waits for them.

Each engine that is lost is replaced, and of the processes that stood still none is left, as it
would hold the memory of a GPU.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.server import Server
from tests.integration.test_plane import all_connected, completion, connect, echo, wait_for

pytestmark = pytest.mark.faults

STALL_LIMIT_S = 3.0
FAILED_OVER_S = 10.0
"""Longest pause of a stream whose engine hangs or has been stopped: the promise."""
MACHINE_S = 4.0
"""What this machine may add to other times, as it starts another engine on few cores."""
TOKENS = 800
STREAMS = 16


@pytest.fixture(scope="module")
def dumps(tmp_path_factory):
    return tmp_path_factory.mktemp("dumps")


@pytest.fixture(scope="module")
def hang_file(tmp_path_factory):
    return tmp_path_factory.mktemp("hang") / "hang"


@pytest.fixture(scope="module")
def server(dumps, hang_file):
    deployment = {"num_replicas": 2, "num_cpus": 0.1, "graceful_shutdown_timeout_s": 1}
    deployment |= {"stall_limit_s": STALL_LIMIT_S, "crash_dump_dir": str(dumps)}
    args = {"models": {"m": {"engine": {"max_num_seqs": 64}, "deployment": deployment}}}
    fake = {"step_s": 0.02, "hang_once": str(hang_file)}
    started = Server(fast_path=True, args=args, fake=fake)
    try:
        yield started
    finally:
        started.stop()


async def stream(client: httpx.AsyncClient, prompt: str) -> float:
    """Stream a completion, check it, and return the longest pause in seconds."""
    text, longest, last = "", 0.0, time.monotonic()
    body = {**completion(prompt, TOKENS), "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                now = time.monotonic()
                longest, last = max(longest, now - last), now
    assert text == echo(prompt, TOKENS)
    return longest


async def disturb(server: Server, harm: Callable[[], Awaitable[None]]) -> float:
    """Harm one of two engines while streams run and more come; returns the longest pause."""
    await asyncio.to_thread(wait_for, server, two_serve, 120)
    async with connect(server) as client:
        streams = [asyncio.ensure_future(stream(client, f"stream {i}")) for i in range(STREAMS)]
        await asyncio.sleep(3)
        await harm()
        for number in range(STREAMS):  # some are sent to the engine before it is missed
            await asyncio.sleep(0.25)
            streams.append(asyncio.ensure_future(stream(client, f"late stream {number}")))
        pauses = await asyncio.gather(*streams)
    await asyncio.to_thread(wait_for, server, two_serve, 120)
    return max(pauses)


def two_serve(health: dict[str, Any]) -> bool:
    return all_connected(health) and sum(e["serving"] for e in health["engines"]) == 2


def is_gone(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


async def gone(pids: list[int]) -> float:
    """Wait until the processes have ended; returns seconds."""
    begin = time.monotonic()
    while not all(map(is_gone, pids)):
        assert time.monotonic() - begin < 60, [pid for pid in pids if not is_gone(pid)]
        await asyncio.sleep(0.05)
    return time.monotonic() - begin


def pair(server: Server) -> tuple[int, int]:
    """Process ids of an engine actor and its replica."""
    name, actor = next(iter(server.call("engine_pids").items()))
    replicas = server.call("pids", class_name="Engine-m")
    (replica,) = (pid for key, pid in replicas.items() if key.endswith(name[-8:]))
    return actor, replica


async def test_a_step_that_hangs(server, hang_file, dumps):
    before = server.call("engine_pids")

    async def hang() -> None:
        hang_file.touch()

    pause = await disturb(server, hang)
    print(f"longest pause: {pause:.1f} s")
    assert STALL_LIMIT_S < pause < STALL_LIMIT_S + MACHINE_S
    (lost,) = (pid for name, pid in before.items() if name not in server.call("engine_pids"))
    assert is_gone(lost)
    (path,) = dumps.glob("trunkline-crash-*.json")
    dump = json.loads(path.read_text())
    assert (dump["reason"], dump["pid"]) == ("stall", lost)
    assert any("_hang_if_told" in "".join(frames) for frames in dump["threads"].values())


async def test_an_engine_actor_that_is_stopped(server, dumps):
    await asyncio.to_thread(wait_for, server, two_serve, 120)
    actor, replica = pair(server)
    ended: list[asyncio.Future[float]] = []

    async def stop() -> None:
        os.kill(actor, signal.SIGSTOP)
        ended.append(asyncio.ensure_future(gone([actor, replica])))

    pause = await disturb(server, stop)
    print(f"longest pause: {pause:.1f} s, both processes gone after {await ended[0]:.1f} s")
    assert pause < FAILED_OVER_S
    assert await ended[0] < FAILED_OVER_S + MACHINE_S
    found = [json.loads(path.read_text()) for path in dumps.glob("trunkline-crash-*.json")]
    (dump,) = (dump for dump in found if dump["reason"] == "silence")
    assert (dump["pid"], dump["engine_pid"]) == (replica, actor)


async def test_a_replica_that_is_stopped(server):
    """Its engine runs on, but what is sent there from then on would never reach it."""
    await asyncio.to_thread(wait_for, server, two_serve, 120)
    actor, replica = pair(server)
    ended: list[asyncio.Future[float]] = []

    async def stop() -> None:
        os.kill(replica, signal.SIGSTOP)
        ended.append(asyncio.ensure_future(gone([actor, replica])))

    pause = await disturb(server, stop)
    print(f"longest pause: {pause:.1f} s, both processes gone after {await ended[0]:.1f} s")
    assert await ended[0] < FAILED_OVER_S + MACHINE_S
    assert pause < FAILED_OVER_S
