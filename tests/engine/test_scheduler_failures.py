"""Requests of the scheduler that are aborted, and steps that fail."""

import pytest

from tests.engine.scheduler_harness import Driver


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
