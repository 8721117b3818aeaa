"""A node that is drained, as before it is taken away: its requests end there or move."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving.conversations import Mix
from benchmarks.serving.failover import judge
from benchmarks.serving.fake_server import fake_target, serve_fake
from benchmarks.serving.leaving import read_health, seconds_until_free
from benchmarks.serving.load import Target, closed_loop
from benchmarks.serving.processes import find_processes

pytestmark = pytest.mark.faults

STREAMS = 40
STRIKE_AFTER_S = 3.0
"""After half of the streams have begun."""
LIMIT_S = 90.0
SETTINGS = ["engines=2", "nodes=3", "step-ms=20", f"drain-s={LIMIT_S}"]
"""A node more than engines."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serve_fake(SETTINGS, tmp_path_factory.mktemp("server") / "server.log") as fake:
        yield fake


def drain_node_of(pid: int) -> None:
    """Tell Ray that the node of a worker will be taken away."""
    parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
    raylet = Path(f"/proc/{parent}/cmdline").read_text()
    address = re.search(r"--gcs-address=([\d.:]+)", raylet)
    node_id = re.search(r"--node_id=(\w+)", raylet)
    assert address and node_id
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
    command += ["--address", address[1], "--node-id", node_id[1], "--reason-message", "test"]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--deadline-remaining-seconds", f"{LIMIT_S:.0f}"]
    # Ray asks for its token where there is one in the user's folder.
    mode = "token" if (Path.home() / ".ray" / "auth_token").exists() else "disabled"
    subprocess.run(command, check=True, env={**os.environ, "RAY_AUTH_MODE": mode})


async def streams_run(target: Target) -> None:
    """Wait until the engines run half of the streams; a slow machine takes its time."""
    async with asyncio.timeout(LIMIT_S):
        while sum(e["running"] for e in (await health(target))["engines"]) < STREAMS // 2:
            await asyncio.sleep(0.2)


async def health(target: Target) -> dict[str, Any]:
    return await asyncio.to_thread(read_health, target)


async def test_no_stream_is_cut(server):
    target = fake_target(server)
    load = asyncio.create_task(
        closed_loop(target, Mix((16, 64), (300, 500)).draw(0), STREAMS, 3 * STREAMS)
    )
    await streams_run(target)
    await asyncio.sleep(STRIKE_AFTER_S)
    before = await asyncio.to_thread(find_processes, server["pid"], "engine_actor")
    drained_at = time.monotonic()
    await asyncio.to_thread(drain_node_of, before[0])
    found = judge((await load).read().answers, [drained_at])
    assert (found["errors"], found["wrong"]) == ({}, 0)
    assert found["pause_s"]["max"] < 5.0
    await asyncio.to_thread(seconds_until_free, target, LIMIT_S)
    after = await asyncio.to_thread(find_processes, server["pid"], "engine_actor")
    assert before[0] not in after and len(after) == 2
