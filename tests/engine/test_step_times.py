"""Where a step that prefills had better end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.step_times import UNKNOWN_TIMES, StepTimes
from tests.engine.scheduler_harness import Driver

DECODE = {16: 3.9, 64: 4.2}
MIXED = {64: 4.2, 128: 4.5, 192: 5.8, 256: 6.5, 320: 7.6, 384: 8.2, 448: 11.1, 512: 11.9, 640: 13.3}
TIMES = StepTimes(DECODE, MIXED, token_s=0.0213)
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
    assert TIMES.end(decodes, lacking, BUDGET, decodes, decodes + 1) == end


def test_a_burst_is_spread_so_that_its_first_requests_decode_meanwhile():
    assert TIMES.end(0, 20_000, BUDGET, decodes=0, batch=64) < 640
    assert TIMES.end(0, 20_000, BUDGET, decodes=0, batch=0) == BUDGET  # none of them decodes


def test_unknown_times_end_nothing():
    assert UNKNOWN_TIMES.end(63, 480, BUDGET, 63, 64) == 543
    assert TIMES.end(65, 480, BUDGET, 65, 66) == 545  # more rows than were measured
    assert StepTimes(DECODE, {}, 0.02).end(63, 480, BUDGET, 63, 64) == 543


@given(
    st.integers(0, 700),
    st.integers(1, 9000),
    st.integers(1, 2000),
    st.integers(0, 64),
    st.integers(0, 64),
)
def test_every_step_gets_on_within_its_budget(taken, lacking, budget, decodes, more):
    end = TIMES.end(taken, lacking, budget, decodes, decodes + more)
    assert taken < end <= taken + min(lacking, budget)


def decoding(times: StepTimes) -> Driver:
    """Sixteen requests that decode."""
    driver = Driver(num_blocks=900, max_model_len=600, budget=2048, max_num_seqs=64, times=times)
    for i in range(16):
        driver.add(f"r{i}", [1, 2], max_tokens=60)
    driver.step()
    return driver


def started(driver: Driver, *lengths: int) -> list[int]:
    """Tokens of the rows of the step in which prompts of these lengths start."""
    for i, length in enumerate(lengths):
        driver.add(f"new{i}", [1 + i] * length, max_tokens=9)
    return driver.schedule().num_tokens


def test_the_next_step_goes_on():
    driver = decoding(TIMES)
    assert started(driver, 200) == [1] * 16 + [128 - 16]
    driver.update()
    assert driver.schedule().num_tokens == [1] * 16 + [200 - 112]
    driver.run()


def test_who_comes_later_fills_the_next_step_up():
    driver = decoding(TIMES)
    assert started(driver, 150, 400) == [1] * 16 + [128 - 16]
    driver.update()
    assert driver.schedule().num_tokens == [1] * 16 + [38, 128 - 16 - 38]
    driver.run()


def test_a_long_context_takes_more_at_a_time():
    driver = Driver(num_blocks=3000, max_model_len=9000, budget=2048, times=TIMES)
    driver.add("decodes", [1, 2], max_tokens=99)
    driver.step()
    driver.add("long", [1] * 8000)
    while driver.scheduler.load().waiting_tokens:
        driver.step()
    shares = [plan.num_tokens[-1] for plan in driver.plans[1:]]
    contexts = [plan.starts[-1] for plan in driver.plans[1:]]
    assert shares[0] < 512
    assert all(share >= before // 8 for share, before in zip(shares[:-1], contexts, strict=False))
    assert shares[-2] > 512


def test_without_times_a_step_takes_all():
    assert started(decoding(UNKNOWN_TIMES), 480, 300) == [1] * 16 + [480, 300]
