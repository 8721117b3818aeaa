"""Clients that leave at random moments, in every way, on a real Ray cluster."""

from __future__ import annotations

import asyncio
from collections import Counter
from itertools import islice

import pytest

from benchmarks.serving.conversations import Mix, echo
from benchmarks.serving.leaving import (
    Cut,
    Leaver,
    draw_leavers,
    run_leavers,
    seconds_until_free,
)
from benchmarks.serving.load import Target, closed_loop
from tests.integration.flags import FLAGS
from tests.integration.server import Server

pytestmark = pytest.mark.integration

STREAMS = 60
ROUNDS = 2
STEP_S = 0.01
LATEST_S = 1.0
FREE_LIMIT_S = 20.0
"""The next report of an idle engine is a second away; the requests would run for up to 4 s more."""
ARGS = {
    "models": {"m": {"engine": {"max_num_seqs": 64}, "deployment": {"num_cpus": 0.1}}},
    # A place that is not given back would be missed in the next round.
    "ingress": {"max_concurrent_requests": STREAMS},
}


@pytest.fixture(scope="module", params=FLAGS)
def server(request):
    started = Server(fast_path=request.param, args=ARGS, fake={"step_s": STEP_S})
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
