"""Clients that leave at random moments, in every way, or read slowly, on a real Ray cluster."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from itertools import islice

import pytest

from benchmarks.serving.conversations import Mix, echo
from benchmarks.serving.leaving import (
    Cut,
    Leaver,
    draw_leavers,
    read_health,
    run_leavers,
    seconds_until_free,
)
from benchmarks.serving.load import Target, closed_loop
from benchmarks.serving.slow_reader import SlowReader
from tests.integration.flags import FLAGS
from tests.integration.server import Server

pytestmark = pytest.mark.integration

STREAMS = 60
ROUNDS = 2
STEP_S = 0.005
LATEST_S = 1.0
FREE_LIMIT_S = 10.0
"""The next report of an idle engine is a second away; 3,000 tokens would go on for 15."""
LIMIT_S = 120.0
"""For all that a slow reader is sent."""
CHOICES = STREAMS // 2
TOKENS = {False: 1000, True: 3000}
"""Of each choice that is read slowly, by `fast_path`. An event has 250 bytes: even if a slow
machine puts two tokens into each, this is more than TCP and HAProxy keep. Without HAProxy nothing
is ever held up."""
PROMPT = " one two three four five"
ARGS = {
    "models": {"m": {"engine": {"max_num_seqs": 64}, "deployment": {"num_cpus": 0.1}}},
    # A place that is not given back would be missed in the next round.
    "ingress": {"max_concurrent_requests": STREAMS},
}


@pytest.fixture(scope="module", params=FLAGS)
def fast_path(request):
    return request.param


@pytest.fixture(scope="module")
def server(fast_path):
    started = Server(fast_path=fast_path, args=ARGS, fake={"step_s": STEP_S})
    try:
        yield started
    finally:
        started.stop()


@pytest.fixture
def target(server):
    target = Target("127.0.0.1", server.port, "m")
    seconds_until_free(target, FREE_LIMIT_S)
    return target


def refused(lefts) -> list[tuple[Cut, int]]:
    """A half-closed request that has no answer yet may be told that it was a bad one."""
    return [
        (left.cut, left.status)
        for left in lefts
        if left.status not in (200, None) and (left.cut, left.status) != (Cut.HALF_CLOSED, 400)
    ]


def answer_all(target: Target) -> None:
    """As many streams as there are places come to their ends, each with its own text."""
    mix = Mix((5, 20), (10, 30))
    load = asyncio.run(closed_loop(target, mix.draw(0), STREAMS, STREAMS))
    answers = load.read().answers
    assert [a.error for a in answers] == [None] * STREAMS
    assert all(a.text == echo(a.prompt, a.asked_tokens) for a in answers)


def test_storm_leaves_nothing_behind(target):
    leavers = draw_leavers(target, LATEST_S, STEP_S, seed=1)
    for _ in range(ROUNDS):
        lefts = asyncio.run(run_leavers(target, list(islice(leavers, STREAMS))))
        assert not refused(lefts) and not [left.error for left in lefts if left.error]
        found = Counter("whole" if x.whole else "part" if x.received else "none" for x in lefts)
        assert all(found[each] for each in ("whole", "part", "none")), found
        assert all(left.whole for left in lefts if left.cut is Cut.AFTER_LAST)
        seconds_until_free(target, FREE_LIMIT_S)
    answer_all(target)


@pytest.mark.parametrize("cut", [cut for cut in Cut if cut is not Cut.AFTER_LAST])
def test_all_leave_at_the_same_moment(target, cut):
    """Also before the engines know of the requests."""
    requests = [target.request(" word" * 100, 3000 + i) for i in range(STREAMS // 2)]
    for after_s in (0.0, 0.2):
        leavers = [Leaver(request, cut, after_s) for request in requests]
        assert not refused(asyncio.run(run_leavers(target, leavers)))
        seconds_until_free(target, FREE_LIMIT_S)


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
    seconds_until_free(target, FREE_LIMIT_S)
    answer_others(target)
