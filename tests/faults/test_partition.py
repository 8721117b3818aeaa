"""A node that is cut off from the others: nothing of it dies, and nothing comes through.

Needs root, as it makes a network namespace.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from benchmarks.serving.conversations import Mix
from benchmarks.serving.failover import judge
from benchmarks.serving.fake_server import fake_target, serve_fake
from benchmarks.serving.leaving import is_free, read_health, seconds_until_free
from benchmarks.serving.load import closed_loop

pytestmark = pytest.mark.faults

HERE, THERE = "10.213.77.1", "10.213.77.2"
ENGINES = 2
STREAMS = 40
STRIKE_AFTER_S = 3.0
BACK_LIMIT_S = 120.0
"""Ray gives a node up that it has not reached for about 20 s; another one joins then."""


@dataclass(frozen=True)
class Cable:
    """Between this network namespace and another one."""

    namespace: str
    end: str

    def plug(self, state: str) -> None:
        ip("link", "set", self.end, state)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def cable() -> Iterator[Cable]:
    if os.geteuid():
        pytest.skip("needs root")
    cable = Cable(f"tl{os.getpid()}", f"tl{os.getpid()}a")
    far = f"tl{os.getpid()}b"
    ip("netns", "add", cable.namespace)
    try:
        ip("link", "add", cable.end, "type", "veth", "peer", "name", far)
        ip("link", "set", far, "netns", cable.namespace)
        ip("addr", "add", f"{HERE}/24", "dev", cable.end)
        ip("link", "set", cable.end, "up")
        inside = ("netns", "exec", cable.namespace, "ip")
        ip(*inside, "addr", "add", f"{THERE}/24", "dev", far)
        ip(*inside, "link", "set", far, "up")
        ip(*inside, "link", "set", "lo", "up")
        yield cable
    finally:
        ip("netns", "del", cable.namespace)  # and the cable with it


@pytest.fixture(scope="module")
def server(cable, tmp_path_factory) -> Iterator[dict[str, Any]]:
    settings = [f"engines={ENGINES}", "step-ms=30", f"nodes={ENGINES}", f"ip={HERE}"]
    settings.append(f"namespace={cable.namespace}:{THERE}")
    with serve_fake(settings, tmp_path_factory.mktemp("server") / "server.log") as fake:
        wait_until_whole(fake)
        yield fake
        cable.plug("up")


def wait_until_whole(server: dict[str, Any]) -> None:
    deadline = time.monotonic() + BACK_LIMIT_S
    while True:
        health = read_health(fake_target(server))
        ages = [engine["age_s"] for engine in health["engines"]]
        if len(ages) == ENGINES and None not in ages and max(ages) < 2 and is_free(health):
            return
        assert time.monotonic() < deadline, health
        time.sleep(0.2)


async def run_cut_off(server: dict[str, Any], cable: Cable, seconds: float) -> dict[str, Any]:
    """Streams on both nodes, in the midst of which one is cut off for some seconds."""
    load = asyncio.create_task(
        closed_loop(fake_target(server), Mix((16, 64), (300, 400)).draw(0), STREAMS, STREAMS)
    )
    await asyncio.sleep(STRIKE_AFTER_S)
    cut_at = time.monotonic()
    cable.plug("down")
    await asyncio.sleep(seconds)
    cable.plug("up")
    return judge((await load).read().answers, [cut_at])


@pytest.mark.parametrize(("seconds", "longest_pause_s"), [(4.0, 8.0), (15.0, 20.0), (60.0, 20.0)])
async def test_no_stream_is_lost(server, cable, seconds, longest_pause_s):
    found = await run_cut_off(server, cable, seconds)
    assert (found["errors"], found["wrong"]) == ({}, 0)
    assert 2.0 < found["pause_s"]["max"] < longest_pause_s
    await asyncio.to_thread(wait_until_whole, server)
    again = await closed_loop(fake_target(server), Mix((16, 64), (50, 99)).draw(1), STREAMS, 80)
    assert [answer.error for answer in again.read().answers] == [None] * 80
    await asyncio.to_thread(seconds_until_free, fake_target(server), BACK_LIMIT_S)
