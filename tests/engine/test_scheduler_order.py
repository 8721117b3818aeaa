"""Who the scheduler lets start first, and who yields when blocks run out."""

from engine.scheduler.preemption import choose_victim
from tests.engine.scheduler_harness import Driver


def order_of_start(driver: Driver) -> list[str]:
    return [new_row.request_id for plan in driver.plans for new_row in plan.new_rows]


def running(driver: Driver) -> list[str]:
    return [request.request_id for request in driver.scheduler._running.requests]


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
