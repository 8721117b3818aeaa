"""The loop around a core: commands from any thread, deltas out, a loud end."""

import queue
import time

import pytest

from engine import loop as loop_module
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import InvalidRequest, StepFailed
from engine.loop import EngineLoop
from engine.outputs import EngineLoad
from tests.deployments.fake_core import FakeCore, expected_tokens
from tests.engine.conftest import request, tiny_config
from tests.engine.test_core_failures import Failing, bug, lost


class Recorder:
    """A loop around a core, and what it said."""

    def __init__(self, core) -> None:
        self.core = core
        self.steps = queue.Queue()
        self.deaths = queue.Queue()
        self.loop = EngineLoop(core, lambda *step: self.steps.put(step), self.deaths.put)

    def deltas_until_finished(self, count: int) -> list:
        found = []
        while sum(d.finish_reason is not None for d in found) < count:
            found += self.steps.get(timeout=5)[0]
        return found


@pytest.fixture
def recorder():
    recorder = Recorder(FakeCore(EngineConfig()))
    yield recorder
    recorder.loop.stop()
    assert not recorder.loop.alive


def test_requests_run_to_their_end(recorder):
    recorder.loop.submit([request("a", [1, 2], max_tokens=3), request("b", [5], max_tokens=2)])
    deltas = recorder.deltas_until_finished(2)
    tokens = {rid: [t for d in deltas if d.request_id == rid for t in d.token_ids] for rid in "ab"}
    assert tokens == {"a": expected_tokens([1, 2], 3), "b": expected_tokens([5], 2)}
    assert recorder.loop.alive


def test_a_refused_request_is_told_so_alone(recorder, monkeypatch):
    add = recorder.core.add

    def refuse_a(wire):
        if wire.request_id == "a":
            raise InvalidRequest("too long", "prompt")
        add(wire)

    monkeypatch.setattr(recorder.core, "add", refuse_a)
    recorder.loop.submit([request("a", [1]), request("b", [2], max_tokens=1)])
    ends = {d.request_id: d for d in recorder.deltas_until_finished(2)}
    assert ends["a"].finish_reason == "error"
    assert (ends["a"].error, ends["a"].refused) == ("too long", True)
    assert ends["b"].finish_reason == "length"


def test_what_comes_is_counted_if_it_is_taken_and_new(recorder):
    moved, too_long = request("moved", [1] * 7), request("long", [1] * 5000)
    moved.resumed = True
    recorder.loop.submit([request("a", [1, 2, 3]), moved, too_long, request("b", [5, 6])])
    load = EngineLoad()
    while load.num_received < 4:
        _, load = recorder.steps.get(timeout=5)
    assert (load.new_requests, load.new_tokens) == (2, 5)


def test_abort_silences_a_request(recorder):
    recorder.loop.submit([request("a", [1], max_tokens=10**6)])
    assert recorder.steps.get(timeout=5)
    recorder.loop.abort(["a"])
    deadline = time.monotonic() + 5
    while recorder.core.has_work:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_failing_step_tells_everyone_and_ends_the_loop(recorder, monkeypatch):
    def fail():
        raise RuntimeError("boom")

    monkeypatch.setattr(recorder.core, "step", fail)
    recorder.loop.submit([request("a", [1]), request("b", [2])])
    ends = recorder.deltas_until_finished(2)
    assert {d.finish_reason for d in ends} == {"error"}
    assert not any("boom" in d.error for d in ends)
    assert str(recorder.deaths.get(timeout=5)) == "boom"
    recorder.loop.stop()
    assert not recorder.loop.alive


def test_a_loop_that_dies_is_dead_before_its_requests_hear_of_it(monkeypatch):
    """What asks for life in between would take the engine for an idle one."""
    core, lives = FakeCore(EngineConfig()), queue.Queue()
    monkeypatch.setattr(core, "step", lambda: 1 / 0)
    loop = EngineLoop(core, lambda *_: lives.put(loop.alive), lambda _: lives.put("death"))
    loop.submit([request("a", [1])])
    assert [lives.get(timeout=5) for _ in range(2)] == [False, "death"]


def test_a_failed_step_is_told_and_the_loop_goes_on(tiny_model):
    core = EngineCore(tiny_config(tiny_model, max_num_seqs=1, async_scheduling=True))
    with Failing(core, {1: ("before", bug)}):
        recorder = Recorder(core)
        recorder.loop.submit([request(rid, [1, 2, 3], max_tokens=3) for rid in "abc"])
        ends = [d for d in recorder.deltas_until_finished(3) if d.finish_reason]
        assert [(d.request_id, d.finish_reason) for d in ends] == [
            ("a", "error"),
            ("b", "length"),
            ("c", "length"),
        ]
        assert recorder.loop.alive
        recorder.loop.stop()
    assert recorder.deaths.empty()


def test_a_lost_device_ends_the_loop_at_once(tiny_model):
    core = EngineCore(tiny_config(tiny_model, max_num_seqs=1))
    with Failing(core, {1: ("result", lost)}):
        recorder = Recorder(core)
        recorder.loop.submit([request("a", [1, 2]), request("b", [3])])
        ends = recorder.deltas_until_finished(2)
        assert [d.request_id for d in ends if d.finish_reason == "error"] == ["a", "b"]
        assert "illegal memory access" in str(recorder.deaths.get(timeout=5))
        recorder.loop.stop()
    assert not recorder.loop.alive


def test_a_failed_step_is_no_progress(monkeypatch):
    core, progress = FakeCore(EngineConfig()), queue.Queue()

    def fail():
        progress.put(loop.last_progress)
        raise StepFailed("a step failed", core.fail_all("it failed"))

    monkeypatch.setattr(core, "step", fail)
    loop = EngineLoop(
        core, lambda deltas, load: deltas and progress.put(loop.last_progress), lambda error: None
    )
    loop.submit([request("a", [1])])
    assert progress.get(timeout=5) == progress.get(timeout=5)
    loop.stop()


def test_who_was_refused_hears_it_even_if_the_step_is_the_end(recorder, monkeypatch):
    def refuse(wire):
        raise InvalidRequest("too long", "prompt")

    def fail():
        raise RuntimeError("boom")

    recorder.core.add(request("a", [1], max_tokens=None))
    monkeypatch.setattr(recorder.core, "add", refuse)
    monkeypatch.setattr(recorder.core, "step", fail)
    recorder.loop.submit([request("b", [2])])
    ends = {d.request_id: d.error for d in recorder.deltas_until_finished(2)}
    assert ends["b"] == "too long"
    assert "failed" in ends["a"]


def test_death_is_told_even_if_failing_fails(recorder, monkeypatch):
    def fail(*_):
        raise RuntimeError("boom")

    monkeypatch.setattr(recorder.core, "step", fail)
    monkeypatch.setattr(recorder.core, "fail_all", fail)
    recorder.loop.submit([request("a", [1])])
    assert str(recorder.deaths.get(timeout=5)) == "boom"


def test_what_the_core_was_at_is_kept_from_before_its_end(tiny_model):
    core = EngineCore(tiny_config(tiny_model, max_num_seqs=1))
    with Failing(core, {1: ("result", lost)}):
        recorder = Recorder(core)
        recorder.loop.submit([request("a", [1, 2]), request("b", [3])])
        assert recorder.deaths.get(timeout=5)
    state = recorder.loop.snapshot()
    assert [r.request_id for r in state.running] == ["a"]
    assert [r.request_id for r in state.waiting] == ["b"]
    assert state.steps[0].in_flight
    recorder.loop.stop()


def test_a_core_that_cannot_tell_what_it_is_at_dies_as_loudly(recorder, monkeypatch):
    def fail(*_):
        raise RuntimeError("boom")

    monkeypatch.setattr(recorder.core, "step", fail)
    monkeypatch.setattr(recorder.core, "snapshot", fail)
    recorder.loop.submit([request("a", [1])])
    assert recorder.deltas_until_finished(1)[0].error
    assert str(recorder.deaths.get(timeout=5)) == "boom"
    assert recorder.loop.snapshot() is None


def test_an_idle_loop_shows_life_and_looks_for_leaks(monkeypatch):
    monkeypatch.setattr(loop_module, "IDLE_WAKEUP_S", 0.01)
    core, checks = FakeCore(EngineConfig()), queue.Queue()
    monkeypatch.setattr(core, "check_invariants", lambda: checks.put(True))
    recorder = Recorder(core)
    began = recorder.loop.last_progress
    for _ in range(3):
        assert recorder.steps.get(timeout=5)[0] == []
        assert checks.get(timeout=5)
    assert recorder.loop.last_progress > began
    recorder.loop.stop()
