"""A client that reads a byte a second, beside others, on a real Ray cluster."""

from __future__ import annotations

import asyncio
import time

import pytest

from benchmarks.serving.conversations import Mix, echo
from benchmarks.serving.leaving import read_health, seconds_until_free
from benchmarks.serving.load import Target, closed_loop
from benchmarks.serving.slow_reader import SlowReader
from tests.integration.flags import FLAGS
from tests.integration.server import Server

pytestmark = pytest.mark.integration

LIMIT_S = 60.0
CHOICES = 32
TOKENS = {False: 1000, True: 3000}
"""Of each choice, by `fast_path`. An event has 250 bytes: even if a slow machine puts two tokens
into each, this is more than TCP and HAProxy keep. Without HAProxy nothing is ever held up."""
PROMPT = " one two three four five"
ARGS = {"models": {"m": {"engine": {"max_num_seqs": 64}, "deployment": {"num_cpus": 0.1}}}}


@pytest.fixture(scope="module", params=FLAGS)
def fast_path(request):
    return request.param


@pytest.fixture(scope="module")
def target(fast_path):
    server = Server(fast_path=fast_path, args=ARGS, fake={"step_s": 0.004})
    try:
        target = Target("127.0.0.1", server.port, "m")
        seconds_until_free(target, LIMIT_S)
        yield target
    finally:
        server.stop()


def wait_until_running(target: Target, count: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while read_health(target)["engines"][0]["running"] != count:
        assert time.monotonic() < deadline, read_health(target)
        time.sleep(0.02)


def answer_others(target: Target) -> None:
    load = asyncio.run(closed_loop(target, Mix((5, 20), (100, 400)).draw(0), 16, 32))
    answers = load.read().answers
    assert [a.error for a in answers] == [None] * 32
    assert all(a.text == echo(a.prompt, a.asked_tokens) for a in answers)


def test_others_finish_and_the_slow_one_gets_all_in_the_end(target, fast_path):
    reader = SlowReader(target, PROMPT, CHOICES, TOKENS[fast_path])
    try:
        wait_until_running(target, CHOICES)
        answer_others(target)
        seconds_until_free(target, LIMIT_S)  # the engine does not wait for its reader
        reader.hurry(LIMIT_S)
    finally:
        reader.leave()
    found = reader.judge()
    assert found["right"] and found["tokens"] == CHOICES * TOKENS[fast_path]
    # Else the answer was in the buffers of TCP and HAProxy, and nothing has been held up at all.
    # Without HAProxy, Serve itself takes whatever is written, and keeps it.
    assert found["most_tokens_merged"] > 100 or not fast_path


def test_slow_ones_that_leave_free_their_blocks(target):
    readers = [SlowReader(target, PROMPT, CHOICES, 4000) for _ in range(2)]
    try:
        wait_until_running(target, 2 * CHOICES)
        time.sleep(2.0)
    finally:
        for reader in readers:
            reader.leave()
    seconds_until_free(target, LIMIT_S)
    answer_others(target)
