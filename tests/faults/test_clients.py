"""Slow and vanishing clients while engines die, on a real Ray cluster."""

from __future__ import annotations

import asyncio
from itertools import islice

import pytest

from benchmarks.serving.conversations import Mix
from benchmarks.serving.failover import Killer, judge
from benchmarks.serving.fake_server import fake_target, serve_fake
from benchmarks.serving.leaving import draw_leavers, run_leavers, seconds_until_free
from benchmarks.serving.load import closed_loop
from benchmarks.serving.slow_reader import SlowReader

pytestmark = pytest.mark.faults

STEP_S = 0.01
EVERY_S = 4.0
STREAMS = 30
CHOICES = 16
TOKENS = 3000
"""Of each choice: more than HAProxy and TCP keep."""
LIMIT_S = 90.0
HITS = 3
LOAD_LIMIT_S = 300.0


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    settings = ["engines=3", f"step-ms={1e3 * STEP_S}"]
    with serve_fake(settings, tmp_path_factory.mktemp("server") / "server.log") as fake:
        yield fake


async def load_until_hit(target, killer):
    """Answers of rounds of streams, as many as it takes on this machine for enough hits."""
    conversations, answers = Mix((16, 64), (400, 800)).draw(0), []
    async with asyncio.timeout(LOAD_LIMIT_S):
        while len(killer.times) < HITS:
            load = await closed_loop(target, conversations, STREAMS, 3 * STREAMS)
            answers += load.read().answers
    return answers


async def test_slow_and_leaving_clients_change_nothing_when_engines_die(server):
    target = fake_target(server)
    leavers = list(islice(draw_leavers(target, 20.0, STEP_S, seed=0), STREAMS))
    slow = await asyncio.to_thread(SlowReader, target, " one two three four", CHOICES, TOKENS)
    killer = Killer(server["pid"], target, "engine_actor:SIGKILL", EVERY_S, seed=0)
    try:
        with killer.at_work():
            answers, _ = await asyncio.gather(
                load_until_hit(target, killer), run_leavers(target, leavers)
            )
        await asyncio.to_thread(seconds_until_free, target, LIMIT_S)
        await asyncio.to_thread(slow.hurry, LIMIT_S)
    finally:
        slow.leave()
    found, slow_found = judge(answers, killer.times), slow.judge()
    assert (found["errors"], found["wrong"]) == ({}, 0)
    assert slow_found["right"] and slow_found["tokens"] == CHOICES * TOKENS
