"""Real engines on the CPU that die under load: every answer is what it would have been."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from typing import Any

import httpx
import pytest

from tests.integration.server import Server
from tests.integration.test_plane import all_connected, connect
from tests.integration.test_plane import wait_for as wait

pytestmark = pytest.mark.faults

MODEL = "smollm2-135m-instruct"
ENGINES = 2
STREAMS = 12
TOKENS = 80
STRIKES = 3
EVERY_S = 4.0
ARGS: dict[str, Any] = {
    "models": {
        MODEL: {
            "engine": {
                "model": MODEL,
                "max_model_len": 1024,
                "kv_cache_memory_bytes": 256 * 2**20,
                "max_num_seqs": 16,
                "cpu_threads": 1,
            },
            "deployment": {"num_replicas": ENGINES, "num_cpus": 0.1},
        }
    }
}
WAYS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.9, "top_p": 0.9, "frequency_penalty": 0.5, "presence_penalty": 0.3},
    {"temperature": 0, "logprobs": 3, "repetition_penalty": 1.2},
    {"temperature": 1.0, "stop": [" the", "."], "min_tokens": 30},
    {"temperature": 0.8, "top_k": 20, "n": 2},
]


@pytest.fixture(scope="module")
def server():
    started = Server(fast_path=True, args=ARGS, fake=None)
    try:
        wait_for_engines(started)
        yield started
    finally:
        started.stop()


def wait_for_engines(server: Server) -> None:
    wait(server, lambda health: len(health["engines"]) == ENGINES and all_connected(health), 120)


def body(number: int) -> dict[str, Any]:
    common = {"model": MODEL, "max_tokens": TOKENS, "ignore_eos": True, "seed": number}
    prompt = f"Here are {number + 3} things to know about the sea, the wind and the sky:"
    return {**common, "prompt": prompt, **WAYS[number % len(WAYS)]}


async def ask(client: httpx.AsyncClient, number: int) -> dict[str, Any]:
    response = await client.post("/v1/completions", json=body(number))
    assert response.status_code == 200, response.text
    answer = response.json()
    return {"choices": answer["choices"], "tokens": answer["usage"]["completion_tokens"]}


async def ask_all(server: Server) -> list[dict[str, Any]]:
    async with connect(server) as client:
        client.timeout = 240
        return await asyncio.gather(*(ask(client, number) for number in range(STREAMS)))


async def kill_some(server: Server) -> int:
    """Kill engines, each time one of two that live; returns how many."""
    rng = random.Random(0)
    for _ in range(STRIKES):
        await asyncio.to_thread(wait_for_engines, server)
        await asyncio.sleep(EVERY_S)
        pids = await asyncio.to_thread(server.call, "engine_pids")
        os.kill(rng.choice(sorted(pids.values())), signal.SIGKILL)
    return STRIKES


async def test_every_answer_is_that_of_an_undisturbed_server(server):
    right = await ask_all(server)
    assert len({choice["text"] for answer in right for choice in answer["choices"]}) > STREAMS
    killing = asyncio.create_task(kill_some(server))
    rounds = 0
    while not killing.done():
        found = await ask_all(server)
        for answer, expected in zip(found, right, strict=True):
            assert texts(answer) == texts(expected)
            assert logprobs(answer) == pytest.approx(logprobs(expected), abs=1e-3)
        rounds += 1
    assert await killing == STRIKES and rounds


def texts(answer: dict[str, Any]) -> list[Any]:
    choices = answer["choices"]
    return [answer["tokens"], *((c["text"], c["finish_reason"]) for c in choices)]


def logprobs(answer: dict[str, Any]) -> list[float]:
    return [
        value
        for choice in answer["choices"]
        for value in (choice["logprobs"] or {}).get("token_logprobs", [])
    ]
