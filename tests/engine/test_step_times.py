"""Where a step that prefills had better end."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.step_times import UNKNOWN_TIMES, StepTimes
from tests.engine.scheduler_harness import Driver

DECODE = {16: 3.9, 64: 4.2, 512: 9.0}
MIXED = {64: 4.2, 128: 4.5, 192: 5.8, 256: 6.5, 320: 7.6, 384: 8.2, 448: 11.1, 512: 11.9, 640: 13.3}
MIXED |= {768: 16.0, 1024: 20.9}
TIMES = StepTimes(DECODE, MIXED, token_s=0.0213, max_rows=256)
"""Milliseconds of a model of 7B on a GPU, rounded."""
BUDGET = 4096


@pytest.mark.parametrize(
    ("decodes", "lacking", "end"),
    [
        (63, 480, 384),  # 13.3 + 4.2 against 8.2 + 6.5
        (63, 321, 384),
        (63, 322, 320),  # 11.1 + 4.2; 8.2 + 4.2; 7.6 + 4.5
        (63, 257, 320),  # 7.6 + 4.2; 6.5 + 4.5 would save less than counts
        (63, 20_000, 384),
        (0, 480, 480),  # nobody needs the next step: 11.9 against 8.2 + 4.5
        (0, 6000, BUDGET),
        (0, 1, 1),
    ],
)
def test_beside_rows_that_decode_a_step_ends_where_all_take_least(decodes, lacking, end):
    assert TIMES.end(decodes, lacking, BUDGET, decodes + 1) == end


def test_a_burst_is_spread_so_that_its_first_requests_decode_meanwhile():
    assert TIMES.end(0, 20_000, BUDGET, batch=64) in MIXED
    assert TIMES.end(0, 20_000, BUDGET, batch=0) == BUDGET  # none of them decodes


def test_few_tokens_after_many_others_are_not_worth_a_step():
    assert TIMES.end(63, 480, BUDGET, 64, least=330) == 543
    assert TIMES.end(63, 900, BUDGET, 64, least=330) in (448, 512, 640)


def test_what_was_not_measured_ends_nothing():
    assert UNKNOWN_TIMES.end(63, 480, BUDGET, 64) == 543
    assert TIMES.end(600, 480, BUDGET, 601) == 1080
    assert TIMES.end(200, 20_000, BUDGET, batch=257) == 200 + BUDGET  # no graph has so many rows
    assert StepTimes(DECODE, {}, 0.02, 256).end(63, 480, BUDGET, 64) == 543


rising = st.lists(st.integers(1, 700), min_size=1, max_size=9, unique=True).map(sorted)
seconds = st.lists(st.floats(0.01, 30), min_size=9, max_size=9).map(sorted)


@settings(deadline=None)
@given(
    st.builds(lambda sizes, times: dict(zip(sizes, times, strict=False)), rising, seconds),
    st.builds(lambda sizes, times: dict(zip(sizes, times, strict=False)), rising, seconds),
    st.floats(0, 0.1),
    st.integers(0, 300),
    st.integers(1, 9000),
    st.integers(1, 2000),
    st.integers(0, 64),
    st.integers(1, 500),
)
def test_whatever_was_measured_every_step_gets_on_within_its_budget(
    decode, mixed, token_s, decodes, lacking, budget, more, least
):
    times = StepTimes(decode, mixed, token_s, max_rows=256)
    end = times.end(decodes, lacking, budget, decodes + more, least)
    most = min(lacking, budget)
    assert decodes + min(least, most) <= end <= decodes + most


def driver_of(times: StepTimes, decodes: int, **options) -> Driver:
    """Some requests that decode."""
    driver = Driver(
        num_blocks=9000, max_model_len=9000, budget=2048, max_num_seqs=300, times=times, **options
    )
    for i in range(decodes):
        driver.add(f"r{i}", [1, 2], max_tokens=90, priority=1)
    driver.step()
    return driver


def tokens_of_steps(driver: Driver, *lengths: int, **options) -> list[int]:
    """Tokens of the steps that it takes to prefill prompts of these lengths."""
    before = len(driver.plans)
    for i, length in enumerate(lengths):
        driver.add(f"new{i}", [1 + i] * length, max_tokens=9, **options)
    while driver.scheduler.load().waiting_tokens:
        driver.step()
    steps = [plan.total_tokens for plan in driver.plans[before:]]
    driver.run()
    return steps


def test_prompts_fill_steps_up_to_good_sizes():
    assert tokens_of_steps(driver_of(TIMES, 63), 480) == [384, 63 + 480 - 321]
    assert tokens_of_steps(driver_of(TIMES, 63), 480, 400)[:2] == [384, 384]
    assert tokens_of_steps(driver_of(UNKNOWN_TIMES, 63), 480, 400) == [63 + 880]


@pytest.mark.parametrize(
    "options",
    [
        {"scheduling_policy": "fcfs", "arrival_time": -1.0},
        {"scheduling_policy": "priority", "priority": 0},
    ],
    ids=["older", "more urgent"],
)
def test_rows_that_decode_count_wherever_the_prompt_stands(options):
    driver = driver_of(TIMES, 63, scheduling_policy=options.pop("scheduling_policy"))
    assert tokens_of_steps(driver, 1100, **options)[:2] == [384, 384]


def test_prompts_that_are_cached_but_for_their_ends_share_a_step_as_others_do():
    head = [*range(5, 12)] * 150
    driver = driver_of(TIMES, 63)
    driver.add("first", [*head, 1])
    while driver.scheduler.load().waiting_tokens:
        driver.step()
    before = len(driver.plans)
    for i in range(40):
        driver.add(f"new{i}", [*head, *[i % 12] * 50])
    driver.step()
    assert driver.plans[before].total_tokens <= 640


def test_a_long_context_takes_more_at_a_time():
    driver = driver_of(TIMES, 1)
    before = len(driver.plans)
    tokens_of_steps(driver, 8000)
    rows = [(plan.starts[-1], plan.num_tokens[-1]) for plan in driver.plans[before:]]
    shares = [(start, share) for start, share in rows if share > 1]
    assert shares[0][1] < 512
    assert all(share >= start // 8 for start, share in shares[:-1])
    assert shares[-2][1] > 512


def test_two_phases_never_share_a_step():
    driver = driver_of(TIMES, 40, two_phase=True)
    before = len(driver.plans)
    tokens_of_steps(driver, *[400] * 5)
    assert driver.plans[before].total_tokens == 2000
