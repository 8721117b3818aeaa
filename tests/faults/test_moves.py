"""Rolling updates and downscaling under load, on a real Ray cluster: no stream is cut."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import httpx
import pytest

from tests.integration.server import Server
from tests.integration.test_plane import all_connected, completion, echo, read_chunks
from tests.integration.test_plane import wait_for as wait

pytestmark = pytest.mark.faults

STREAMS = 40


def arguments(num_replicas: int, max_num_seqs: int) -> dict[str, Any]:
    deployment = {"num_replicas": num_replicas, "num_cpus": 0.1}
    engine = {"max_num_seqs": max_num_seqs}
    return {"models": {"m": {"engine": engine, "deployment": deployment}}}


@pytest.fixture(params=[False, True], ids=["default-flags", "fast-path"])
def server(request):
    args = arguments(num_replicas=3, max_num_seqs=64)
    started = Server(fast_path=request.param, args=args, fake={"step_s": 0.02})
    try:
        wait_for_engines(started, 3)
        yield started
    finally:
        started.stop()


def wait_for_engines(server: Server, count: int) -> None:
    wait(server, lambda health: len(health["engines"]) == count and all_connected(health), 120)


def connect(server: Server) -> httpx.AsyncClient:
    """A client that does not use connections twice.

    A proxy that is reloaded ends those that it keeps open, perhaps just when a request is sent;
    HTTP clients then try again, but httpx does not.
    """
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits)


async def keep_streaming(client: httpx.AsyncClient, number: int, stop: asyncio.Event) -> int:
    """One stream after another, each compared with what it should say; returns how many."""
    lengths, count = random.Random(number), 0
    while not stop.is_set():
        tokens, prompt = lengths.randint(50, 400), f"stream {number}, answer {count}"
        answer = await stream(client, completion(prompt, tokens))
        assert answer == (echo(prompt, tokens), [])
        count += 1
    return count


async def stream(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[str, list[Any]]:
    """Stream a completion; again if it was refused, but not if it had begun.

    Serve stops the one ingress that there is, and the last of the old engines, before the new ones
    are there.
    """
    while True:
        content = {**body, "stream": True}
        try:
            async with client.stream("POST", "/v1/completions", json=content) as response:
                if response.status_code == 200:
                    return await read_chunks(response)
                assert response.status_code == 503
        except (httpx.ConnectError, httpx.RemoteProtocolError) as error:
            assert isinstance(error, httpx.ConnectError) or "without sending" in str(error)
        await asyncio.sleep(0.2)


@pytest.mark.parametrize(
    "changed",
    [arguments(num_replicas=1, max_num_seqs=64), arguments(num_replicas=3, max_num_seqs=63)],
    ids=["downscale", "rolling-update"],
)
async def test_no_stream_is_cut(server, changed):
    stop = asyncio.Event()
    async with connect(server) as client:
        streams = [
            asyncio.ensure_future(keep_streaming(client, number, stop)) for number in range(STREAMS)
        ]
        await asyncio.sleep(3)
        await asyncio.to_thread(server.call, "deploy", args=changed)
        count = changed["models"]["m"]["deployment"]["num_replicas"]
        await asyncio.to_thread(wait_for_engines, server, count)
        await asyncio.sleep(3)
        stop.set()
        assert sum(await asyncio.gather(*streams)) > STREAMS
