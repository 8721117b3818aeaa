import pytest

from engine.core import EngineCore
from engine.profile import IdleTime, StepRecord, add_device_times
from tests.engine.conftest import run_core, tiny_config
from tests.engine.test_core import GREEDY, prompts, requests


class Event:
    """A point in the device's time, as `torch.cuda.Event` has it."""

    def __init__(self, milliseconds):
        self.at = milliseconds

    def elapsed_time(self, end):
        return end.at - self.at


def records(count):
    return [StepRecord(1, 1, 1, True, 0.0, 0.0, 0.0, 0.0, 0.0) for _ in range(count)]


def pairs(*times):
    return [None if pair is None else (Event(pair[0]), Event(pair[1])) for pair in times]


def test_device_times_and_the_gaps_between():
    steps = records(3)
    add_device_times(steps, pairs((10, 14), (14.5, 20), (20, 21)))
    assert [step.device_s for step in steps] == pytest.approx([0.004, 0.0055, 0.001])
    assert steps[0].idle_s is None
    assert [step.idle_s for step in steps[1:]] == pytest.approx([0.0005, 0.0])


def test_a_step_without_timers_is_passed_over():
    steps = records(3)
    add_device_times(steps, pairs((0, 1), None, (4, 5)))
    assert (steps[1].device_s, steps[1].idle_s) == (None, None)
    assert steps[2].idle_s == pytest.approx(0.003)


@pytest.mark.parametrize("ahead", [False, True])
def test_each_step_has_a_record(tiny_model, ahead):
    core = EngineCore(
        tiny_config(tiny_model, device="cpu", async_scheduling=ahead, enable_prefix_caching=False)
    )
    core.start_profile()
    outputs = run_core(core, requests(GREEDY))
    found = core.stop_profile()
    assert len(found) == core.load().step
    generated = sum(len(tokens) for tokens, _ in outputs.values())
    # Every token but a request's last is computed.
    assert sum(step.tokens for step in found) == sum(map(len, prompts())) + generated - 24
    assert all(step.decode == (step.tokens == step.rows) for step in found)
    assert all(step.device_s is None and step.idle_s is None for step in found)
    for name in ("schedule_s", "prepare_s", "launch_s", "update_s"):
        assert all(getattr(step, name) > 0 for step in found)
    run_core(core, requests(GREEDY, 1))
    assert len(core.stop_profile()) == len(found)  # nothing is kept once it is stopped


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_idle_time_adds_up():
    clock = Clock()
    idle = IdleTime(clock)
    for seconds, change in ((2, idle.end), (5, idle.begin), (1, idle.begin), (1, idle.end)):
        clock.now += seconds
        change()
    clock.now += 7
    idle.end()
    assert idle.seconds == 4


def let_take(seconds, clock, function):
    """`function`, which takes so long by this clock."""

    def slow(*args):
        clock.now += seconds
        return function(*args)

    return slow


@pytest.mark.parametrize("ahead", [False, True])
def test_a_device_is_idle_while_no_step_is_with_it(tiny_model, ahead):
    clock = Clock()
    core = EngineCore(tiny_config(tiny_model, device="cpu", async_scheduling=ahead))
    core._idle = IdleTime(clock)
    core.scheduler.schedule = let_take(1, clock, core.scheduler.schedule)
    core.runner.execute = let_take(2, clock, core.runner.execute)
    clock.now += 30
    outputs = run_core(core, requests(GREEDY, 3))
    load = core.load()
    assert load.generated_tokens == sum(len(tokens) for tokens, _ in outputs.values())
    # One step ahead, only the first is scheduled while the device has nothing to do.
    assert load.idle_s == 30 + (1 if ahead else load.step)
    clock.now += 10
    assert core.load().idle_s == load.idle_s + 10
