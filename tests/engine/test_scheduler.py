"""The scheduler by example; the harness checks plans, inputs and results throughout."""

import time
from types import SimpleNamespace

import pytest

from engine.errors import ConfigError, InvalidRequest
from engine.kv_cache.block_pool import InvariantViolation
from engine.outputs import TokenDelta
from engine.scheduler.preemption import choose_victim
from engine.step import StepResult
from tests.engine.scheduler_harness import EOS, Driver, sampled_token


def order_of_start(driver: Driver) -> list[str]:
    return [new_row.request_id for plan in driver.plans for new_row in plan.new_rows]


def running(driver: Driver) -> list[str]:
    return [request.request_id for request in driver.scheduler._running.requests]


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


# Abort and failure


def test_abort_frees_blocks_at_once_when_nothing_is_in_flight():
    driver = Driver()
    driver.add("runs", [1] * 9)
    driver.step()
    driver.add("waits", [2])
    driver.abort("runs", "waits", "runs", "unknown")
    assert not driver.scheduler.has_work
    driver.check_idle()


def test_abort_waits_for_the_step_that_writes():
    driver = Driver()
    driver.add("a", [1] * 9)
    driver.schedule()
    driver.abort("a")
    assert driver.scheduler.load().free_blocks < driver.scheduler.load().total_blocks
    assert driver.update() == []
    driver.check_idle()


def test_an_id_may_be_used_again_after_an_abort():
    driver = Driver()
    driver.add("a", [1, 2])
    driver.schedule()
    driver.abort("a")
    driver.add("a", [3, 4])
    driver.update()
    driver.run()


def test_failure_ends_every_request_and_forgets_the_cache():
    driver = Driver()
    driver.add("a", [1] * 9)
    driver.schedule()
    driver.add("b", [1] * 9)
    driver.fail_all()
    driver.check_idle()
    driver.scheduler.check_invariants()
    driver.add("c", [1] * 9)
    assert driver.schedule().starts == [0]
    driver.update()
    driver.run()


def test_failed_steps_take_their_requests_and_leave_the_others():
    driver = Driver(max_num_seqs=2)
    lost, queued = driver.add("lost", [1] * 9), driver.add("also lost", [2] * 9)
    waiting = driver.add("waiting", [1] * 9)
    driver.schedule()
    driver.schedule()
    driver.fail_in_flight()
    assert lost.aborted and queued.aborted and not waiting.aborted
    driver.scheduler.check_invariants()
    assert driver.schedule().starts == [0]
    driver.update()
    driver.run()


@pytest.mark.parametrize("ahead", [False, True])
def test_steps_without_memory_are_tried_again_once(ahead):
    driver = Driver(max_num_seqs=2)
    twice, once = driver.add("twice", [1] * 9), driver.add("once", [2] * 9, max_tokens=1)
    late = driver.add("late", [1] * 9)
    driver.schedule()
    if ahead:
        driver.schedule()
    driver.retry_in_flight()
    driver.scheduler.check_invariants()
    while not once.got:
        driver.step()
    driver.schedule()
    driver.retry_in_flight()
    assert twice.aborted and not late.aborted
    driver.run(ahead=ahead)
    assert late.got and not once.aborted


def test_a_request_that_is_alone_in_a_step_without_memory_ends():
    driver = Driver()
    alone = driver.add("alone", [1] * 9)
    driver.schedule()
    driver.retry_in_flight()
    assert alone.aborted
    driver.check_idle()


def test_the_budget_is_halved_for_want_of_memory_and_comes_back():
    driver = Driver(num_blocks=512, max_num_seqs=12)
    for i in range(12):
        driver.add(f"r{i}", [i] * 48)
    assert driver.schedule().total_tokens == 64
    driver.retry_in_flight()
    totals = []
    for _ in range(11):
        totals.append(driver.schedule().total_tokens)
        driver.update()
    assert totals[:4] == [32, 35, 38, 41]
    assert totals[-1] == 64
    driver.run()


def test_too_many_rows_for_the_memory_are_halved_as_well():
    driver = Driver(max_num_seqs=4)
    for i in range(4):
        driver.add(f"r{i}", [i], max_tokens=8)
    driver.step()
    assert len(driver.schedule().rows) == 4
    driver.retry_in_flight()
    assert len(driver.schedule().rows) == 1  # of two tokens
    driver.update()
    driver.run()


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


# Order


def test_fcfs_goes_by_arrival():
    driver = Driver(max_num_seqs=1)
    driver.add("second", [1], arrival_time=2.0)
    driver.add("first", [1, 2, 3], arrival_time=1.0)
    driver.run()
    assert order_of_start(driver) == ["first", "second"]


def test_priority_goes_by_number_then_arrival():
    driver = Driver(max_num_seqs=1, scheduling_policy="priority")
    for name, priority in (("d", 5), ("b", 0), ("c", 0), ("a", -1)):
        driver.add(name, [1], priority=priority)
    driver.run()
    assert order_of_start(driver) == ["a", "b", "c", "d"]


def test_priority_decides_who_yields():
    driver = Driver(num_blocks=9, max_model_len=8, block_size=1, scheduling_policy="priority")
    driver.add("low", [1, 2, 3], priority=1, max_tokens=5)
    driver.step()
    driver.add("high", [4, 5, 6, 7], priority=0)
    driver.step()
    assert running(driver) == ["high", "low"]
    driver.step()
    assert running(driver) == ["high"]
    driver.run()


def test_sjf_goes_by_length():
    driver = Driver(max_num_seqs=1, scheduling_policy="sjf")
    for length in (9, 3, 6):
        driver.add(f"{length}", [1] * length)
    driver.run()
    assert order_of_start(driver) == ["3", "6", "9"]


def run_against_a_stream_of_short_ones(max_wait_s: float) -> list[str]:
    driver = Driver(max_num_seqs=1, scheduling_policy="sjf", sjf_max_wait_s=max_wait_s)
    driver.add("long", [1] * 9)
    driver.add("longest", [1] * 10)
    for i in range(30):
        driver.add(f"short {i}", [2], max_tokens=1)
        driver.now += 1.0
        driver.step()
    driver.run()
    return order_of_start(driver)


def test_sjf_starves_nobody():
    starts = run_against_a_stream_of_short_ones(max_wait_s=5.0)
    assert starts.index("long") == 4
    assert starts.index("longest") == 5


def test_sjf_without_the_bound_would_starve():
    """Inverse check: the stream is long enough to starve somebody."""
    assert run_against_a_stream_of_short_ones(max_wait_s=1000.0)[-2:] == ["long", "longest"]


def test_a_preempted_request_goes_before_those_that_never_started():
    driver = Driver(num_blocks=7, max_model_len=6, block_size=1)
    driver.add("a", [1, 2], max_tokens=4)
    driver.add("b", [3, 4], max_tokens=4, arrival_time=9.0)
    driver.step()
    driver.add("c", [5] * 5, arrival_time=5.0)
    driver.run()
    assert order_of_start(driver) == ["a", "b", "b", "c"]


# Preemption


def two_that_share(driver: Driver) -> None:
    """`first` and `sharer` have 8 of 9 tokens in common; `loner` has 3 of its own."""
    driver.add("first", [1] * 9, max_tokens=20)
    driver.add("loner", [5, 6, 7], max_tokens=20)
    driver.add("sharer", [1] * 8 + [2], max_tokens=20)
    driver.step()


def test_the_victim_is_who_wastes_least():
    driver = Driver()
    two_that_share(driver)
    blocks, requests = driver.scheduler._blocks, driver.scheduler._running.requests
    assert [blocks.wasted_by_preempting(request) for request in requests] == [1, 3, 1]
    assert choose_victim(requests, blocks).request_id == "sharer"
    assert choose_victim(requests[:2], blocks).request_id == "first"
    assert choose_victim(requests[1:2], blocks).request_id == "loner"


def test_who_frees_no_block_is_no_victim():
    driver = Driver()
    two_that_share(driver)
    blocks, requests = driver.scheduler._blocks, driver.scheduler._running.requests
    blocks.pool.touch(requests[2].block_ids)
    assert choose_victim(requests[1:], blocks).request_id == "loner"
    blocks.pool.touch(requests[1].block_ids)
    assert choose_victim(requests[1:], blocks).request_id == "loner"


def test_the_first_in_order_always_gets_on():
    driver = Driver(num_blocks=9, max_model_len=8, block_size=1)
    driver.add("a", [1, 2], max_tokens=6)
    driver.add("b", [3, 4], max_tokens=6)
    truth, ends = driver.truths["a"], []
    while driver.scheduler.has_work:
        before = len(truth.got)
        ends += [delta.request_id for delta in driver.step() if delta.finish_reason]
        assert truth.reason or len(truth.got) == before + 1
    assert ends == ["a", "b"]
    assert driver.scheduler.load().num_preemptions > 0


def test_nothing_starts_unless_all_its_tokens_fit():
    driver = Driver(num_blocks=9, max_model_len=8, block_size=1, budget=2)
    driver.add("a", [1, 2, 3, 4], max_tokens=4)
    for _ in range(3):
        driver.step()
    driver.add("b", [5, 6, 7, 7, 6])
    driver.step()
    assert running(driver) == ["a"]
    driver.run()
    assert driver.scheduler.load().num_preemptions == 0


def test_an_admission_leaves_room_to_grow():
    driver = Driver(num_blocks=101, max_model_len=100, block_size=1, budget=200)
    driver.add("alone", [1] * 49, max_tokens=3)
    driver.add("tight", [2] * 50, max_tokens=3)
    driver.step()
    assert running(driver) == ["alone"]
    driver.add("fits", [3] * 98, max_tokens=1, arrival_time=-1.0)
    driver.run()
    assert order_of_start(driver) == ["alone", "fits", "tight"], "no headroom when none runs"


def test_a_preempted_request_finds_its_blocks_again():
    driver = Driver(force_preempt_every=3)
    driver.add("a", [1] * 9, max_tokens=6)
    driver.step()
    driver.step()
    driver.step()
    plan = driver.schedule()
    assert [new_row.request_id for new_row in plan.new_rows] == ["a"]
    assert plan.starts == [8]
    driver.update()
    driver.run()
    assert driver.scheduler.load().prefix_queries == 9, "only the first admission counts"


def test_prompt_logprobs_are_told_once():
    driver = Driver(force_preempt_every=2, budget=4)
    driver.add("a", [1] * 9, prompt_logprobs=0, max_tokens=5, logprobs=0)
    driver.add("b", [2] * 5, max_tokens=5)
    driver.run()
    assert driver.scheduler.load().num_preemptions > 1


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
