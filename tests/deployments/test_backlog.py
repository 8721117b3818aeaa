"""What waits before a new request, how long that takes, and who is refused for it."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from deployments.backlog import Backlog, BacklogLimits, QueueSpeed
from deployments.load_table import LoadTable
from deployments.placement import Booking
from engine.outputs import EngineLoad


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def load(waiting: int, prefilled: int) -> EngineLoad:
    return EngineLoad(waiting_tokens=waiting, prefilled_tokens=prefilled)


def reports(speed: QueueSpeed, rate: float, seconds: float, waiting: int):
    """A report ten times a second."""
    done = [round(rate * i / 10) for i in range(round(seconds * 10) + 1)]
    for before, after in pairwise(done):
        speed.follow(load(waiting, before), load(waiting, after), 0.1)


def test_a_queue_takes_as_long_as_its_tokens_at_the_speed_of_late():
    speed = QueueSpeed()
    assert speed.seconds_for(1000) == 0.0  # nothing is known
    reports(speed, 500, 20, waiting=1)
    assert speed.seconds_for(1000) == pytest.approx(2.0, rel=0.01)
    reports(speed, 100, 60, waiting=1)
    assert speed.seconds_for(1000) == pytest.approx(10.0, rel=0.01)


def test_time_without_a_queue_tells_nothing_of_its_speed():
    speed = QueueSpeed()
    reports(speed, 500, 10, waiting=1)
    reports(speed, 1, 5, waiting=0)
    assert speed.seconds_for(1000) == pytest.approx(2.0, rel=0.05)
    reports(speed, 1, 100, waiting=0)
    assert speed.seconds_for(1000) == 0.0  # nor of late


def test_a_queue_of_a_moment_refuses_nobody():
    speed = QueueSpeed()
    reports(speed, 0, 0.5, waiting=10)
    assert speed.seconds_for(1000) == 0.0


def test_a_queue_that_stands_still_never_ends():
    speed = QueueSpeed()
    reports(speed, 0, 3, waiting=10)
    assert speed.seconds_for(10) == math.inf
    assert speed.seconds_for(0) == 0.0


def test_an_engine_that_began_anew_counts_from_there():
    speed = QueueSpeed()
    reports(speed, 500, 20, waiting=1)
    speed.follow(load(1, 10_000), load(1, 0), 0.1)  # its counter begins at 0 again
    reports(speed, 500, 20, waiting=1)
    assert speed.seconds_for(1000) == pytest.approx(2.0, rel=0.02)


@pytest.mark.parametrize(
    ("limits", "backlog", "retry"),
    [
        (BacklogLimits(), Backlog(1e9, math.inf), None),
        (BacklogLimits(100, 2.0), Backlog(100, 2.0), None),
        (BacklogLimits(100, None), Backlog(101, 9.0), 1),
        (BacklogLimits(None, 2.0), Backlog(9, 2.1), 1),
        (BacklogLimits(None, 2.0), Backlog(9, 12.5), 11),
        (BacklogLimits(None, 2.0), Backlog(9, math.inf), 60),
        (BacklogLimits(5, 2.0), Backlog(9, 6.0), 4),
    ],
)
def test_limits(limits, backlog, retry):
    assert limits.retry_after_s(backlog) == retry


def queued_table(waiting: dict[str, int]) -> LoadTable:
    """Engines that get 100 tokens a second done, with so many waiting."""
    clock = Clock()
    table = LoadTable(clock)
    table.set_members("E", waiting)
    for second in range(3):
        clock.now = float(second)
        for engine_id, tokens in waiting.items():
            table.report(engine_id, load(tokens, 100 * second))
    return table


def test_the_backlog_is_that_of_the_engine_that_is_done_first():
    assert queued_table({"a": 1000, "b": 200}).backlog("E") == pytest.approx((200, 2.0))
    assert queued_table({"a": 1000, "b": 200}).backlog("other") == Backlog()


def test_a_lost_engine_is_no_idle_one():
    table = queued_table({"a": 1000, "b": 200})
    table.mark_down("b")
    assert table.backlog("E") == pytest.approx((1000, 10.0))


def test_requests_count_before_and_after_they_are_placed_and_no_longer():
    table = queued_table({"a": 1000, "b": 200})
    table.expect("E", "r", 60)
    assert table.backlog("E") == pytest.approx((230, 2.3))
    assert table.book({"b": 9}, Booking("r", 60)) == "b"
    assert table.backlog("E") == pytest.approx((260, 2.6))
    table.release("r")
    assert table.backlog("E") == pytest.approx((200, 2.0))
    table.expect("E", "s", 60)
    table.release("s")
    assert table.backlog("E") == pytest.approx((200, 2.0))
