"""The scheduler by example; the harness checks plans, inputs and results throughout."""

import time
from types import SimpleNamespace

import pytest

from engine.errors import ConfigError, InvalidRequest
from engine.kv_cache.block_pool import InvariantViolation
from engine.outputs import TokenDelta
from engine.step import StepResult
from tests.engine.scheduler_harness import EOS, Driver, sampled_token


def stop_at(length: int, first: int) -> dict:
    """Options that end a request at its `length`-th output by a stop token of its own."""
    tokens = [sampled_token(0, first + i) for i in range(length)]
    assert tokens[-1] not in tokens[:-1]
    return {"stop_token_ids": [tokens[-1]], "max_tokens": 20}


# Plans


def test_a_long_prompt_is_computed_in_chunks_beside_decodes():
    driver = Driver(budget=6)
    driver.add("short", [1, 2], max_tokens=8)
    driver.add("long", [3] * 12)
    for _ in range(4):
        driver.step()
    assert [plan.num_tokens for plan in driver.plans] == [[2, 4], [1, 5], [1, 3], [1, 1]]
    assert [plan.samples for plan in driver.plans][:3] == [[True, False], [True, False], [True] * 2]


def test_a_row_of_one_token_comes_first_even_when_admitted_last():
    driver = Driver()
    driver.add("long", [1, 2, 3])
    driver.add("single", [5])
    plan = driver.schedule()
    assert (plan.num_tokens, plan.rows) == ([1, 3], [1, 0])


def test_no_more_than_max_num_seqs_run():
    driver = Driver(max_num_seqs=2)
    for i in range(3):
        driver.add(f"r{i}", [1])
    driver.step()
    load = driver.scheduler.load()
    assert (load.num_running, load.num_waiting) == (2, 1)


def test_an_idle_scheduler_plans_nothing():
    driver = Driver()
    assert not driver.scheduler.has_work
    assert driver.schedule().rows == []


def test_two_phases_never_mix():
    driver = Driver(two_phase=True, budget=4)
    driver.add("a", [1, 2, 3], max_tokens=5)
    driver.step()
    driver.add("b", [4] * 7)
    for _ in range(3):
        driver.step()
    assert [plan.num_tokens for plan in driver.plans] == [[3], [4], [3], [1, 1]]


# One step ahead


def test_the_token_in_flight_stays_on_the_device():
    driver = Driver()
    driver.add("a", [1, 2], max_tokens=3)
    first, second = driver.schedule(), driver.schedule()
    assert first.input_ids == {0: [1, 2]}
    assert second.input_ids == {}
    assert (second.starts, second.samples) == ([2], [True])


def test_nothing_is_scheduled_past_the_length():
    driver = Driver()
    driver.add("a", [1, 2], max_tokens=2)
    driver.schedule()
    driver.schedule()
    driver.update()
    assert driver.schedule().rows == []
    assert [delta.finish_reason for delta in driver.update()] == ["length"]


def test_what_follows_a_stop_is_dropped_and_blocks_wait_for_it():
    driver = Driver(block_size=1, max_model_len=32)
    driver.add("a", [1, 2], **stop_at(1, first=2))
    driver.schedule()
    driver.schedule()
    (delta,) = driver.update()
    assert delta.finish_reason == "stop"
    assert not driver.scheduler.has_work
    assert driver.scheduler.load().free_blocks == driver.scheduler.load().total_blocks - 3
    driver.scheduler.check_invariants()
    assert driver.update() == []
    driver.check_idle()


def test_a_row_is_not_reused_while_its_last_step_is_in_flight():
    driver = Driver(max_num_seqs=1)
    driver.add("a", [1, 2], **stop_at(1, first=2))
    driver.add("b", [3])
    driver.schedule()
    driver.schedule()
    driver.update()
    assert driver.schedule().rows == []
    driver.update()
    assert driver.schedule().rows == [0]


def test_a_preempted_request_keeps_the_token_in_flight():
    driver = Driver(force_preempt_every=2)
    truth = driver.add("a", [1, 2], max_tokens=3)
    driver.schedule()
    assert driver.schedule().num_preempted == 1
    assert driver.schedule().rows == []  # its token has not arrived
    driver.update()
    assert truth.got == [sampled_token(0, 2)]
    plan = driver.schedule()
    assert plan.new_rows[0].token_ids == [1, 2, *truth.got]
    driver.run()


def test_a_preempted_request_may_end_with_the_token_in_flight():
    driver = Driver(force_preempt_every=2)
    truth = driver.add("a", [1, 2], **stop_at(1, first=2))
    driver.schedule()
    driver.schedule()
    driver.update()
    assert truth.reason == "stop"
    assert not driver.scheduler.has_work
    driver.check_idle()


def test_a_request_waits_for_blocks_that_are_due_rather_than_preempt():
    driver = Driver(num_blocks=5, max_model_len=4, block_size=1)
    driver.add("a", [1, 2], max_tokens=2)
    driver.add("b", [3, 4], max_tokens=2)
    driver.schedule()
    driver.abort("b")
    assert driver.schedule().rows == []
    driver.update()
    assert driver.schedule().rows == [0]
    driver.run()
    assert driver.scheduler.load().num_preemptions == 0


def test_results_must_come_in_order():
    driver = Driver()
    driver.add("a", [1])
    driver.schedule()
    second = driver.schedule()
    with pytest.raises(InvariantViolation, match="oldest"):
        driver.scheduler.update(second, StepResult([1]))


# Stop rules


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_tokens": 3}, (3, "length", None)),
        ({"ignore_eos": False, "max_tokens": 60}, ("eos", "stop", None)),
        ({"ignore_eos": True, "max_tokens": 60}, (60, "length", None)),
        ({"ignore_eos": False, "stop_token_ids": [EOS], "max_tokens": 60}, ("eos", "stop", None)),
        ({"stop_token_ids": [EOS], "max_tokens": 60}, ("eos", "stop", EOS)),
        ({"max_tokens": None}, (62, "length", None)),
    ],
)
def test_reasons(options, expected):
    driver = Driver()
    truth = driver.add("a", [1, 2], **options)
    driver.run()
    length, *reasons = expected
    assert [truth.reason, truth.stop_reason] == reasons
    assert (truth.got[-1] == EOS and EOS not in truth.got[:-1]) if length == "eos" else True
    assert length in ("eos", len(truth.got))


def test_no_stop_before_min_tokens():
    tokens = [sampled_token(0, 2 + i) for i in range(20)]
    first = tokens[0]
    again = tokens.index(first, 1) + 1
    driver = Driver()
    truth = driver.add("a", [1, 2], stop_token_ids=[first], min_tokens=2, max_tokens=20)
    driver.run()
    assert len(truth.got) == again


# Load and refusals


def test_load_tells_tokens_and_blocks():
    driver = Driver(num_blocks=11, max_model_len=32, budget=6, max_num_seqs=1)
    driver.add("a", [1] * 9)
    driver.add("b", [2] * 5)
    driver.step()
    load = driver.scheduler.load()
    assert (load.running_tokens, load.waiting_tokens) == (6, 3 + 5)
    assert (load.free_blocks, load.total_blocks, load.step) == (7, 10, 1)


def test_a_cache_too_small_for_one_sequence_is_refused():
    with pytest.raises(ConfigError, match="max_model_len"):
        Driver(num_blocks=4, block_size=4, max_model_len=13)


def test_a_request_without_room_is_refused():
    driver = Driver(max_model_len=8)
    with pytest.raises(InvalidRequest, match="none is left to generate"):
        driver.add("a", [1] * 8)
    with pytest.raises(InvalidRequest, match="none is left to generate"):
        driver.add("b", [1], [1, 1], max_tokens=2)
    assert not driver.scheduler.has_work


def test_a_taken_id_is_refused():
    driver = Driver()
    driver.add("a", [1])
    with pytest.raises(InvalidRequest, match="in use"):
        driver.add("a", [2])


def test_corrupt_bookkeeping_is_noticed():
    driver = Driver()
    driver.add("a", [1] * 9)
    driver.step()
    request = driver.scheduler._running.requests[0]
    request.block_ids.pop()
    with pytest.raises(InvariantViolation, match="requests hold it"):
        driver.scheduler.check_invariants()


# Times


@pytest.fixture
def clock(monkeypatch):
    """Time as the test has it, but for the moment of arrival."""
    clock = SimpleNamespace(now=time.monotonic())
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


def started(delta: TokenDelta) -> tuple[str, int, int]:
    return delta.request_id, round(delta.queued_s, -3), round(delta.prefill_s, -3)


def test_the_first_delta_tells_how_a_request_came_to_its_first_token(clock):
    driver = Driver(max_num_seqs=1, budget=4)
    driver.add("first", [1], max_tokens=1)
    driver.add("second", [2] * 6, max_tokens=3)
    told = []
    while driver.scheduler.has_work:  # the second is admitted in the second step, computed in two
        clock.now += 1000
        driver.schedule()
        clock.now += 10_000
        told += map(started, driver.update())
    assert told[:2] == [("first", 1000, 10_000), ("second", 12_000, 21_000)]
    assert told[2:] == [("second", 0, 0)] * 2


def test_a_vector_tells_the_same(clock):
    driver = Driver()
    driver.add("r", [1, 2], pooling="last")
    clock.now += 3000
    assert [started(delta) for delta in driver.step()] == [("r", 3000, 0)]
