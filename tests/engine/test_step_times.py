"""Where a step that prefills had better end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.step_times import UNKNOWN_TIMES, StepTimes
from tests.engine.scheduler_harness import Driver

DECODE = {16: 3.9, 64: 4.2}
MIXED = {64: 4.2, 128: 4.5, 192: 5.8, 256: 6.5, 320: 7.6, 384: 8.2, 448: 11.1, 512: 11.9, 640: 12.3}
TIMES = StepTimes(DECODE, MIXED, max_mixed_rows=70)


def split(decodes: int, count: int, rows: int | None = None, times: StepTimes = TIMES) -> int:
    return times.split(decodes, decodes + 1 if rows is None else rows, decodes, count)


@pytest.mark.parametrize(
    ("decodes", "count", "now"),
    [
        (63, 480, 384 - 63),  # 12.3 + 4.2 against 8.2 + 6.5; 6.5 + 8.2 is as short, but later
        (63, 385, 384 - 63),  # 11.1 + 4.2 against 8.2 + 4.5
        (63, 321, 321),  # 8.2 + 4.2; 7.6 + 4.5 saves less than is worth while
        (63, 577, 577),  # 12.3 + 4.2; 8.2 + 7.6 likewise
        (63, 578, 578),  # larger than any that was measured
        (0, 480, 480),  # nobody needs the next step: 11.9 against 8.2 + 4.5
        (0, 1, 1),
    ],
)
def test_a_step_ends_where_both_take_least(decodes, count, now):
    assert split(decodes, count) == now


def test_unknown_times_split_nothing():
    assert split(63, 480, times=UNKNOWN_TIMES) == 480
    assert split(63, 480, rows=71) == 480
    assert split(65, 480) == 480


@given(st.integers(0, 64), st.integers(0, 300), st.integers(1, 700))
def test_a_share_is_never_empty_and_pays(decodes, others, count):
    def takes(times, needed):
        return min((s for size, s in times.items() if size >= needed), default=0.0)

    now = TIMES.split(decodes, 1, decodes + others, count)
    assert 1 <= now <= count
    if now < count:
        whole = takes(MIXED, decodes + others + count) + takes(DECODE, decodes or 99)
        both = takes(MIXED, decodes + others + now) + takes(MIXED, decodes + count - now)
        assert both < whole


def started(driver: Driver, *lengths: int) -> list[int]:
    """Tokens of the rows of the step in which prompts of these lengths start."""
    for i, length in enumerate(lengths):
        driver.add(f"new{i}", [1 + i] * length, max_tokens=2)
    return driver.schedule().num_tokens


def decoding(times: StepTimes) -> Driver:
    driver = Driver(num_blocks=600, max_model_len=600, budget=2048, max_num_seqs=70, times=times)
    for i in range(16):
        driver.add(f"r{i}", [1, 2], max_tokens=40)
    driver.step()
    return driver


def test_the_last_to_start_ends_the_step():
    driver = decoding(TIMES)
    assert started(driver, 480) == [1] * 16 + [384 - 16]
    driver.update()
    assert driver.schedule().num_tokens == [1] * 16 + [480 - 368]
    driver.run()
    assert driver.truths["new0"].reason == "length"


def test_who_waits_takes_what_is_left():
    driver = decoding(TIMES)
    assert started(driver, 250, 200) == [1] * 16 + [250, 384 - 266]
    driver.run()


def test_without_times_a_step_takes_all():
    assert started(decoding(UNKNOWN_TIMES), 480) == [1] * 16 + [480]
