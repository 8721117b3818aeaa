"""More load than an engine can do, on a real Ray cluster: who waits too long is refused at once."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.serving.conversations import Mix, arrivals
from benchmarks.serving.fake_server import fake_target, serve_fake
from benchmarks.serving.load import open_loop
from benchmarks.serving.overload import judge

pytestmark = pytest.mark.integration

LIMIT_S = 1.0
SECONDS = 12.0
CAPACITY = 4 / (50 * 0.01)
"""Requests a second: 4 rows, answers of 50 tokens, steps of 10 ms."""
OFFERED = 4 * CAPACITY
UNLIMITED_S = SECONDS / 2 * (OFFERED / CAPACITY - 1)
"""How long the median request would wait if none were refused."""


def test_estimated_wait_bounds_the_wait(tmp_path):
    settings = ["step-ms=10", "max-num-seqs=4", f"max-estimated-wait-s={LIMIT_S}"]
    settings += ["max-ongoing-requests=200"]
    with serve_fake(settings, tmp_path / "server.log") as fake:
        requests = Mix((20, 40), (50, 50)).draw(0)
        times = arrivals(OFFERED, 1, 0)
        load = asyncio.run(open_loop(fake_target(fake), requests, times, round(OFFERED * SECONDS)))
    found = judge(load)
    assert not found["errors"] and not found["malformed"]
    assert set(found["refused"]) == {"429"}
    assert found["refused"]["429"] > found["offered"] / 2
    assert found["ttft_ms"]["p50"] < UNLIMITED_S / 2 * 1e3
