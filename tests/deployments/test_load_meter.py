"""What an engine's reports come to."""

from __future__ import annotations

import time

import pytest

from deployments.load_meter import LATELY_S, EngineUse, LoadMeter
from engine.outputs import EngineLoad
from tests.deployments.test_trunk import collect, request, submit


def test_nothing_is_known_before_the_first_report():
    assert LoadMeter(8).read(0.0) == EngineUse()


def test_shares_of_rows_and_blocks():
    meter = LoadMeter(8)
    meter.follow(EngineLoad(num_running=6, num_waiting=3, free_blocks=25, total_blocks=100), 1.0)
    use = meter.read(1.0)
    assert (use.running, use.waiting, use.rows_used, use.blocks_used) == (6, 3, 0.75, 0.75)


def test_rates_are_those_at_which_requests_come_and_fade():
    meter = LoadMeter(8)
    for tick in range(600):  # a request of 50 tokens every 0.1 s, half computed at once
        come = tick * 50
        load = EngineLoad(prefilled_tokens=come // 2, waiting_tokens=come // 2)
        load.new_requests, load.new_tokens = tick, come
        meter.follow(load, tick * 0.1)
    use = meter.read(59.9)
    assert use.arriving_tokens_s == pytest.approx(500, rel=0.03)
    assert use.arriving_requests_s == pytest.approx(10, rel=0.03)
    assert use.done_tokens_s == pytest.approx(250, rel=0.02)
    assert meter.read(89.9).arriving_tokens_s < 2


async def test_the_first_requests_of_an_engine_count(actor):
    trunk, moved = actor.subscribe("x"), request("moved")
    moved.resumed = True
    await submit(actor, "x", request("new"), moved)
    await collect(trunk, 2)
    use = actor._meter.read(time.monotonic())
    assert 0 < use.arriving_requests_s <= 1 / LATELY_S


def test_speed_is_unknown_without_a_queue():
    meter = LoadMeter(8)
    for tick in range(100):
        meter.follow(EngineLoad(prefilled_tokens=tick * 100), tick * 0.1)
    assert meter.read(9.9).done_tokens_s == 0


@pytest.mark.parametrize("new", [True, False], ids=["new", "moved here"])
def test_what_has_just_come_is_no_queue(new):
    meter, come = LoadMeter(8), 0
    for tick in range(100):  # each is begun by the step after the next
        done, come = max(0, come - 1000), come + 1000
        load = EngineLoad(prefilled_tokens=done, waiting_tokens=come - done)
        load.new_tokens = come * new
        meter.follow(load, tick * 0.1)
    assert meter.read(9.9).done_tokens_s == 0


def test_first_tokens_of_late():
    meter = LoadMeter(8)
    for number in range(100):
        meter.note_first_token(number / 100, 1.0)
    meter.note_first_token(30.0, -20.0)
    assert meter.read(2.0).ttft_s == pytest.approx(0.95, abs=0.02)
    assert meter.read(12.0).ttft_s == 0


def test_steps_that_computed_prompts_say_how_fast_it_is_at_least():
    meter = LoadMeter(8)
    for tick in range(100):  # a prompt of 40 tokens in every tenth step of 0.1 s
        load = EngineLoad(num_running=1, prefilled_tokens=40 * (tick // 10))
        meter.follow(load, tick * 0.1)
    assert meter.read(9.9).step_tokens_s == pytest.approx(400)
    assert meter.read(9.9).done_tokens_s == 0


def test_a_step_that_was_seen_late_does_not_make_the_next_one_look_fast():
    meter = LoadMeter(8)
    meter.follow(EngineLoad(num_running=1), 0.0)
    meter.follow(EngineLoad(num_running=1), 0.3)
    meter.follow(EngineLoad(num_running=1, prefilled_tokens=1000), 0.30001)
    assert meter.read(0.31).step_tokens_s <= 20_000
