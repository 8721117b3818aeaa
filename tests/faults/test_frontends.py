"""Ingress replicas and proxies that are killed or stopped under load, on a real Ray cluster.

HTTP cannot move a connection: the streams of a process that dies break. All others must not notice,
and afterwards everything must be as before.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.serving.answers import Answer
from benchmarks.serving.client import LOST
from benchmarks.serving.conversations import Mix, echo
from benchmarks.serving.fake_server import fake_target, serve_fake
from benchmarks.serving.leaving import is_free, read_health, seconds_until_free
from benchmarks.serving.load import closed_loop
from benchmarks.serving.processes import find_processes

pytestmark = pytest.mark.faults

STREAMS = 40
STEP_S = 0.02
MIX = Mix((16, 64), (200, 400))
SHORT = Mix((16, 64), (40, 80))
STRIKE_AFTER_S = 3.0
"""By then all streams run, and none has ended."""
PAUSE_S = 5.0
BACK_LIMIT_S = 60.0
BROKEN = (LOST, "cannot connect", "HTTP 503")
"""What clients may see while a frontend is gone."""

Server = dict[str, Any]


@pytest.fixture(scope="module", params=["fast", "default"])
def server(request, tmp_path_factory):
    settings = ["engines=2", "ingresses=2", f"step-ms={1e3 * STEP_S}", f"flags={request.param}"]
    with serve_fake(settings, tmp_path_factory.mktemp("server") / "server.log") as fake:
        yield fake


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def stop_for_a_while(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    time.sleep(PAUSE_S)
    os.kill(pid, signal.SIGCONT)


async def answers_during(
    server: Server, role: str, strike: Callable[[int], None]
) -> tuple[list[Answer], float]:
    """Streams in the midst of which one process of a role is struck; returns when, too."""
    load = asyncio.create_task(closed_loop(fake_target(server), MIX.draw(0), STREAMS, 2 * STREAMS))
    await asyncio.sleep(STRIKE_AFTER_S)
    struck_at = time.monotonic()
    await asyncio.to_thread(strike, find_processes(server["pid"], role)[0])
    return (await load).read().answers, struck_at


def count_broken(answers: list[Answer], struck_at: float) -> int:
    """How many of the streams that ran were lost; all others must be right or have been refused."""
    broken = 0
    for answer in answers:
        if answer.error is None:
            assert answer.text == echo(answer.prompt, answer.asked_tokens)
        else:
            assert answer.error.startswith(BROKEN)
            broken += answer.sent < struck_at
    return broken


def seconds_until_whole(server: Server, processes: set[str]) -> float:
    """Wait until every process is there again, and the server says that all is free."""
    begin = time.monotonic()
    while not is_whole(server, processes):
        assert time.monotonic() - begin < BACK_LIMIT_S
        time.sleep(0.2)
    return time.monotonic() - begin


def is_whole(server: Server, processes: set[str]) -> bool:
    try:
        return is_free(read_health(fake_target(server))) and living(server) >= processes
    except OSError:
        return False


async def assert_all_is_well(server: Server, processes: set[str]) -> None:
    """Everything is replaced, nothing has leaked, and many streams all come whole."""
    await asyncio.to_thread(seconds_until_whole, server, processes)
    for seed in (1, 2):
        load = await closed_loop(fake_target(server), SHORT.draw(seed), STREAMS, STREAMS)
        assert [answer.error for answer in load.read().answers] == [None] * STREAMS
    await asyncio.to_thread(seconds_until_free, fake_target(server), BACK_LIMIT_S)


def living(server: Server) -> set[str]:
    """Which processes there are, by role and number."""
    roles = ("ingress", "engine_actor", "engine_replica", "haproxy_manager", "proxy", "controller")
    counts = {role: len(find_processes(server["pid"], role)) for role in roles}
    counts["haproxy"] = min(1, len(find_processes(server["pid"], "haproxy")))  # old ones linger
    return {f"{role} {number}" for role, count in counts.items() for number in range(count)}


@pytest.mark.parametrize("role", ["ingress", "haproxy", "haproxy_manager", "proxy", "controller"])
async def test_only_the_streams_of_what_died_are_lost(server, role):
    before = living(server)
    if f"{role} 0" not in before:
        pytest.skip("only with the fast path")
    answers, struck_at = await answers_during(server, role, kill)
    broken = count_broken(answers, struck_at)
    front = "haproxy" if server["flags"] == "fast" else "proxy"
    if role == "ingress":
        assert 0 < broken < STREAMS
    elif role == front:
        assert broken == STREAMS
    elif role != "haproxy_manager":
        assert broken == 0
    await assert_all_is_well(server, before)


@pytest.mark.parametrize(
    "role", ["ingress", "haproxy", "haproxy_manager", "proxy", "controller", "engine_replica"]
)
async def test_streams_of_what_stops_for_a_while_go_on(server, role):
    before = living(server)
    if f"{role} 0" not in before:
        pytest.skip("only with the fast path")
    answers, struck_at = await answers_during(server, role, stop_for_a_while)
    assert count_broken(answers, struck_at) == 0
    await assert_all_is_well(server, before)
