"""Routing over four engines on a real Ray cluster: only the model behind each of them is fake."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving.answers import Run
from benchmarks.serving.conversations import Mix
from benchmarks.serving.fake_server import fake_target, serve_fake
from benchmarks.serving.journal import Journal
from benchmarks.serving.load import closed_loop
from benchmarks.serving.multi_turn import judge, send_bursts

pytestmark = pytest.mark.integration

NUM_CHATS = 12
"""Few enough that no engine can get so many of their turns that it would have to send one away."""
CHATS = Mix(input_tokens=(400, 600), output_tokens=(10, 20), turns=4, think_s=0.3)
"""A history is dear enough to return to it even if the engine has some requests more."""


INGRESSES = [
    pytest.param(1, id="one-ingress"),
    pytest.param(2, id="two-ingresses", marks=pytest.mark.slow),  # a start, and looser bounds
]


@pytest.fixture(scope="module", params=INGRESSES)
def fake(request, tmp_path_factory):
    log = tmp_path_factory.mktemp("fake") / "server.log"
    settings = ["engines=4", "step-ms=10", "max-num-seqs=64", f"ingresses={request.param}"]
    with serve_fake(settings, log) as server:
        yield server


def chat(fake: dict[str, Any]) -> Run:
    target = fake_target(fake)
    return asyncio.run(closed_loop(target, CHATS.draw(7), NUM_CHATS, NUM_CHATS)).read()


def test_every_turn_of_a_chat_finds_the_ones_before_it(fake):
    run = chat(fake)
    assert [answer.error for answer in run.answers] == [None] * NUM_CHATS * CHATS.turns
    record = judge(run.answers, Journal(Path(fake["journal"])).engines, fake["block_size"])
    assert record["hit_tokens"] == record["infinite_hit_tokens"] > 0
    assert all(row["requests"] for row in record["engines"])


def test_a_burst_is_spread_evenly_every_time(fake):
    splits = send_bursts(fake_target(fake), Path(fake["journal"]), 10)
    if fake["ingresses"] == 1:
        assert splits == [[4, 4, 4, 4]] * 10
    else:  # what one ingress has just sent the other cannot know, but each is even by itself
        assert all(sum(split) == 16 and split[0] <= 5 for split in splits), splits
