"""Engines that come and go with the load, on the nodes of a real Ray cluster; no stream fails."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.integration.server import Server
from tests.integration.test_plane import connect, echo, health, read_chunks, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.slow]

NODES = 4
ROWS = 8
GPU_MODEL, CPU_MODEL = "on-gpus", "on-cpus"
NODE = {"num_cpus": 1, "num_gpus": 1}
"""Engines of the one model fit nowhere else; the ingress, which takes more CPUs, only on the head.
"""
ENGINE = {"max_num_seqs": ROWS}
SCALING = {"downscale_delay_s": 4, "target_use": 0.8, "upscale_delay_s": 1}
ARGS: dict[str, Any] = {
    "models": {
        GPU_MODEL: {
            "engine": ENGINE,
            "deployment": {
                "num_gpus": 1,
                "num_cpus": 0.1,
                "autoscaling": {**SCALING, "min_replicas": 1, "max_replicas": NODES},
            },
        },
        CPU_MODEL: {
            "engine": ENGINE,
            "deployment": {
                "num_cpus": 0.25,
                "autoscaling": {**SCALING, "min_replicas": 0, "max_replicas": 2},
            },
        },
    },
    "ingress": {"num_cpus": 2},
}
LIMIT_S = 90.0
LONG = 3000
"""Tokens of a stream that takes a minute."""


@pytest.fixture(scope="module")
def server():
    fake = {"step_s": 0.02}
    started = Server(fast_path=True, args=ARGS, fake=fake, nodes=[NODE] * NODES)
    try:
        wait_for(started, lambda state: count(state, GPU_MODEL) == 1)
        yield started
    finally:
        started.stop()


def count(state: dict[str, Any], model: str) -> int:
    return sum(engine["model"] == model and engine["serving"] for engine in state["engines"])


async def until(server: Server, model: str, size: int) -> None:
    """Wait until a model has so many engines."""
    await asyncio.to_thread(wait_for, server, lambda state: count(state, model) == size, LIMIT_S)


async def check_stream(client: httpx.AsyncClient, model: str, prompt: str, tokens: int) -> None:
    """Read a stream, which must say what it should."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        assert await read_chunks(response) == (echo(prompt, tokens), [])


@contextlib.asynccontextmanager
async def streams(server: Server, model: str, number: int) -> AsyncIterator[None]:
    """Keep so many streams going, one after another, each of which must say what it should."""
    stop = asyncio.Event()

    async def keep_going(client: httpx.AsyncClient, name: int) -> None:
        for turn in itertools.count():
            if stop.is_set():
                return
            await check_stream(client, model, f"stream {name}, turn {turn}", 60 + 7 * name)

    async with connect(server) as client:
        client.timeout = LIMIT_S
        tasks = [asyncio.create_task(keep_going(client, name)) for name in range(number)]
        try:
            yield
        finally:
            stop.set()
            await asyncio.gather(*tasks)


async def places(server: Server) -> list[str]:
    """Nodes of all engines."""
    found = await asyncio.to_thread(server.call, "places", class_name="EngineActor")
    return list(found.values())


async def test_engines_follow_the_load_up_and_down_and_have_a_gpu_each(server):
    async with streams(server, GPU_MODEL, 2):
        async with streams(server, GPU_MODEL, NODES * ROWS - 6):
            await until(server, GPU_MODEL, NODES)
            nodes = await places(server)
            assert len(nodes) == len(set(nodes)) == NODES
        await until(server, GPU_MODEL, 1)


async def test_long_streams_move_and_hold_no_engine(server):
    async with connect(server) as client:
        client.timeout = LIMIT_S
        async with streams(server, GPU_MODEL, NODES * ROWS - 6):
            await until(server, GPU_MODEL, NODES)
            long = asyncio.gather(
                *(check_stream(client, GPU_MODEL, f"long {n}", LONG) for n in range(NODES))
            )
            await asyncio.sleep(2)  # in which all have begun, on all engines
        async with asyncio.timeout(LIMIT_S):
            while len(await places(server)) > 1:
                await asyncio.sleep(0.5)
        assert not long.done()
        await long


async def test_a_request_brings_the_first_engine_of_an_idle_model(server):
    assert count(await asyncio.to_thread(health, server), CPU_MODEL) == 0
    async with streams(server, CPU_MODEL, 1):
        await until(server, CPU_MODEL, 1)
    await until(server, CPU_MODEL, 0)


async def test_models_grow_by_their_own_load(server):
    async with streams(server, CPU_MODEL, 2 * ROWS), streams(server, GPU_MODEL, 2):
        await until(server, CPU_MODEL, 2)
        assert count(await asyncio.to_thread(health, server), GPU_MODEL) == 1
    await until(server, CPU_MODEL, 0)


async def test_streams_outlive_a_node_and_its_engine_is_replaced(server):
    async with streams(server, GPU_MODEL, 2 * ROWS - 2):
        await until(server, GPU_MODEL, 3)
        lost = (await places(server))[0]
        await asyncio.to_thread(server.call, "end_node", node_id=lost)
        async with asyncio.timeout(LIMIT_S):
            while lost in await places(server):
                await asyncio.sleep(0.5)
        await until(server, GPU_MODEL, 3)
    await asyncio.to_thread(server.call, "add_node", node=NODE)
    await until(server, GPU_MODEL, 1)
