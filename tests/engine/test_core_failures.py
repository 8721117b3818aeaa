"""Steps that fail: who is lost, who goes on, and when the engine gives up."""

import contextlib
import dataclasses
import weakref
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core import MAX_FAILED_STEPS, EngineCore
from engine.errors import StepFailed
from tests.engine.conftest import request, tiny_config


def oom():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def lost():
    return RuntimeError("CUDA error: an illegal memory access was encountered")


def bug():
    return ZeroDivisionError("division by zero")


WAYS = {
    f"{'ahead' if ahead else 'in turn'}, {'with' if caching else 'without'} prefix cache": {
        "async_scheduling": ahead,
        "enable_prefix_caching": caching,
    }
    for ahead in (False, True)
    for caching in (False, True)
}
PLACES = ("before", "sampling", "after", "result")
FEATURES = [
    {"temperature": 0.0},
    {"temperature": 1.0, "top_k": 40, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"temperature": 0.8, "logit_bias": {7: 4.0, 8: 4.0}, "min_tokens": 3, "stop_token_ids": [7]},
    {"temperature": 1.0, "top_p": 0.8, "presence_penalty": 1.0, "logprobs": 2},
]


def wires(count=12):
    """Requests with every kind of row state; half of them begin alike."""
    shared = list(range(40, 80))
    prompts = [
        (shared if i % 2 else []) + [(i * 31 + k) % 300 for k in range(5 + i)] for i in range(count)
    ]
    return [
        request(f"r{i}", prompt, **{"seed": i, "max_tokens": 8, **FEATURES[i % len(FEATURES)]})
        for i, prompt in enumerate(prompts)
    ]


class Failing:
    """Lets a core's runner fail: number of its step, from 0 → (place, what makes the exception)."""

    def __init__(self, core, failures):
        self.core, self.runner, self.failures = core, core.runner, failures
        self.steps = 0

    def __enter__(self):
        self.real_execute, self.real_sample = self.runner.execute, self.runner.sampler.sample
        self.runner.execute = self.execute
        return self

    def __exit__(self, *_):
        del self.runner.execute

    def execute(self, plan):
        place, error = self.failures.get(self.steps, (None, None))
        self.steps += 1
        if place == "before":
            raise error()
        sample = self.fail(error) if place == "sampling" else self.real_sample
        self.runner.sampler.sample = sample
        try:
            pending = self.real_execute(plan)
        finally:
            del self.runner.sampler.sample
        if place == "after":
            raise error()
        return SimpleNamespace(result=self.fail(error)) if place == "result" else pending

    @staticmethod
    def fail(error):
        def call(*_):
            raise error()

        return call


def run(core, requests):
    """Run to the end through failures; id → tokens, and id → finish reason."""
    tokens, reasons = {wire.request_id: [] for wire in requests}, {}
    for wire in requests:
        core.add(wire)
    for _ in range(1000):
        if not core.has_work:
            break
        try:
            deltas = core.step()
        except StepFailed as failure:
            deltas = failure.deltas
            assert all(delta.finish_reason == "error" for delta in deltas)
        core.check_invariants()
        for delta in deltas:
            assert delta.request_id not in reasons, "a word after the end"
            tokens[delta.request_id] += delta.token_ids
            if delta.finish_reason is not None:
                reasons[delta.request_id] = delta.finish_reason
    assert not core.has_work
    assert reasons.keys() == tokens.keys()
    load = core.load()
    assert load.free_blocks == load.total_blocks
    assert load.num_running == load.num_waiting == load.running_tokens == 0
    return tokens, reasons


def check(found, undisturbed):
    """Those that finished have the right tokens, those that failed the first of them."""
    (tokens, reasons), (wanted, ends) = found, undisturbed
    for rid, reason in reasons.items():
        if reason == "error":
            assert tokens[rid] == wanted[rid][: len(tokens[rid])]
        else:
            assert (tokens[rid], reason) == (wanted[rid], ends[rid])


@pytest.fixture(scope="module")
def cores(tiny_model):
    """One core for each way, with fewer rows and a smaller budget than there is work for."""
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 32}
    return {way: EngineCore(tiny_config(tiny_model, **options, **WAYS[way])) for way in WAYS}


@pytest.fixture(scope="module")
def undisturbed(cores):
    found = [run(core, wires()) for core in cores.values()]
    assert all(each == found[0] for each in found)
    assert len({token for tokens in found[0][0].values() for token in tokens}) > 20
    assert set(found[0][1].values()) <= {"stop", "length"}
    return found[0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("step", [0, 3, 9])
def test_a_failed_step_takes_its_requests_and_the_others_finish(
    cores, undisturbed, way, place, step
):
    core = cores[way]
    with Failing(core, {step: (place, bug)}):
        tokens, reasons = run(core, wires())
    check((tokens, reasons), undisturbed)
    failed = [rid for rid, reason in reasons.items() if reason == "error"]
    assert 1 <= len(failed) <= 4  # rows of a step
    assert run(core, wires()) == undisturbed


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("step", [0, 3, 9])
def test_a_step_without_memory_is_tried_again(cores, undisturbed, way, place, step):
    with Failing(cores[way], {step: (place, oom)}):
        assert run(cores[way], wires()) == undisturbed


@pytest.mark.parametrize("way", WAYS)
def test_whoever_lacks_memory_twice_is_lost_and_the_others_finish(cores, undisturbed, way):
    with Failing(cores[way], {3: ("before", oom), 5: ("before", oom)}):
        tokens, reasons = run(cores[way], wires())
    check((tokens, reasons), undisturbed)
    assert 1 <= list(reasons.values()).count("error") <= 4
    assert run(cores[way], wires()) == undisturbed


def test_no_step_is_as_large_as_the_one_that_lacked_memory(tiny_model):
    core = EngineCore(tiny_config(tiny_model, max_num_batched_tokens=32))
    sizes = []
    with Failing(core, {0: ("sampling", oom)}) as failing:
        core.runner.execute = lambda plan: sizes.append(plan.total_tokens) or failing.execute(plan)
        run(core, wires())
    assert sizes[:3] == [32, 16, 18]
    assert max(sizes[3:]) == 32


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    way=st.sampled_from(sorted(WAYS)),
    failures=st.dictionaries(
        st.integers(0, 60), st.tuples(st.sampled_from(PLACES), st.sampled_from([bug, oom]))
    ),
)
def test_every_request_ends_once_whatever_fails(cores, undisturbed, way, failures):
    # Never three in a row, not even when each takes a launched step with it; steps that are small
    # for want of memory may compute no more than a part of a prompt.
    kept = {step: each for step, each in failures.items() if step % 12 == 0}
    with Failing(cores[way], kept):
        check(run(cores[way], wires()), undisturbed)


@pytest.mark.parametrize("ahead", [False, True])
def test_both_steps_in_flight_are_lost_and_no_others(tiny_model, ahead):
    core = EngineCore(tiny_config(tiny_model, max_num_seqs=2, async_scheduling=ahead))
    for wire in wires(4):
        core.add(wire)
    with Failing(core, {2: ("before", bug)}), pytest.raises(StepFailed) as caught:
        for _ in range(3):
            core.step()
    assert [delta.request_id for delta in caught.value.deltas] == ["r0", "r1"]
    assert core.load().num_waiting == 2
    core.check_invariants()


def test_running_requests_outside_the_failed_step_are_computed_anew(tiny_model):
    core = EngineCore(tiny_config(tiny_model, two_phase=True, async_scheduling=False))
    first, second = wires(2)
    wanted = run(core, [first, second])[0]
    core.add(first)
    told = core.step() + core.step()
    core.add(second)
    with Failing(core, {0: ("after", bug)}), pytest.raises(StepFailed) as caught:
        core.step()  # prefills the second alone
    assert [delta.request_id for delta in caught.value.deltas] == ["r1"]
    while core.has_work:
        told += core.step()
    assert [token for delta in told for token in delta.token_ids] == wanted["r0"]
    core.check_invariants()


@pytest.mark.parametrize("place", PLACES)
def test_nothing_of_a_failed_step_is_in_the_prefix_cache(tiny_model, place):
    core = EngineCore(tiny_config(tiny_model, max_num_seqs=1, enable_prefix_caching=True))
    wanted = run(core, wires(1))[0]
    again, twice = request("x", list(range(100)), max_tokens=4), request("y", list(range(100)))
    core.add(again)
    with Failing(core, {0: (place, bug)}), pytest.raises(StepFailed):
        core.step()
    before = core.load().prefix_hits
    fresh = EngineCore(tiny_config(tiny_model, enable_prefix_caching=False))
    assert run(core, [twice]) == run(fresh, [twice])
    assert core.load().prefix_hits == before
    assert run(core, wires(1))[0] == wanted


@pytest.mark.parametrize("ahead", [False, True])
def test_three_failed_steps_in_a_row_are_the_end(tiny_model, ahead):
    core = EngineCore(tiny_config(tiny_model, max_num_seqs=1, async_scheduling=ahead))
    for wire in wires(5):
        core.add(wire)
    failed = 0
    with (
        Failing(core, dict.fromkeys(range(9), ("result", bug))),
        pytest.raises(ZeroDivisionError),
    ):
        while True:
            try:
                core.step()
            except StepFailed as failure:
                failed += len(failure.deltas)
    assert failed == MAX_FAILED_STEPS - 1
    assert len(core.fail_all("over")) == 5 - failed


def test_a_good_step_forgives(tiny_model):
    core = EngineCore(tiny_config(tiny_model, max_num_seqs=1))
    steps = (0, 1, 3, 4, 6, 7)
    with Failing(core, dict.fromkeys(steps, ("before", bug))):
        _, reasons = run(core, wires(7))
    assert list(reasons.values()).count("error") == len(steps)


@pytest.mark.parametrize("place", PLACES)
def test_a_lost_device_is_the_end_at_once(tiny_model, place):
    core = EngineCore(tiny_config(tiny_model))
    core.add(wires(1)[0])
    with Failing(core, {0: (place, lost)}), pytest.raises(RuntimeError, match="illegal") as caught:
        core.step()
    assert not isinstance(caught.value, StepFailed)
    assert [delta.request_id for delta in core.fail_all("over")] == ["r0"]


def test_the_scheduler_failing_is_the_end(tiny_model, monkeypatch):
    core = EngineCore(tiny_config(tiny_model))
    core.add(wires(1)[0])
    monkeypatch.setattr(core.scheduler, "update", Failing.fail(KeyError))
    with pytest.raises(KeyError):
        core.step()


@pytest.mark.parametrize(("error", "words"), [(oom, "out of memory"), (bug, "failed")])
def test_clients_and_operators_are_told_what_concerns_them(tiny_model, error, words):
    core = EngineCore(tiny_config(tiny_model))
    core.add(wires(1)[0])
    with Failing(core, {0: ("before", error)}), pytest.raises(StepFailed, match=words) as caught:
        core.step()
    told = caught.value.deltas[0].error
    assert words in told and told.endswith(".")
    assert not any(inside in told for inside in ("CUDA", "GiB", "division", "Error", "max_num"))
    assert ("max_num_batched_tokens" in str(caught.value)) == (error is oom)
    assert isinstance(caught.value.__cause__, type(error()))


def on_gpu(core, monkeypatch, synchronize=lambda: None):
    """Pretend that the core's device is a GPU; returns what is asked of it."""
    calls = []
    core.info = dataclasses.replace(core.info, device="cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait") or synchronize())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    return calls


@pytest.mark.parametrize(("error", "calls"), [(oom, ["wait", "empty"]), (bug, ["wait"])])
def test_the_device_is_waited_for_and_memory_given_back(tiny_model, monkeypatch, error, calls):
    core = EngineCore(tiny_config(tiny_model, async_scheduling=True))
    asked = on_gpu(core, monkeypatch)
    core.add(wires(1)[0])
    core.step()
    with Failing(core, {0: ("before", error)}), pytest.raises(StepFailed):
        core.step()
    assert asked == calls


def test_a_device_that_turns_out_to_be_lost_is_the_end(tiny_model, monkeypatch):
    core = EngineCore(tiny_config(tiny_model))
    on_gpu(core, monkeypatch, Failing.fail(lost))
    core.add(wires(1)[0])
    with Failing(core, {0: ("before", bug)}), pytest.raises(RuntimeError, match="illegal"):
        core.step()
    assert [delta.request_id for delta in core.fail_all("over")] == ["r0"]


def test_a_failure_that_is_kept_does_not_keep_tensors(tiny_model, monkeypatch):
    core = EngineCore(tiny_config(tiny_model))
    held = []

    def execute(plan):
        activations = torch.zeros(1)
        held.append(weakref.ref(activations))
        raise oom()

    monkeypatch.setattr(core.runner, "execute", execute)
    core.add(wires(1)[0])
    with pytest.raises(StepFailed) as caught:
        core.step()
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert [ref() for ref in held] == [None]


def test_aborting_what_failed_or_waits_is_harmless(tiny_model):
    core = EngineCore(tiny_config(tiny_model, max_num_seqs=1, async_scheduling=True))
    for wire in wires(3):
        core.add(wire)
    core.step()
    core.abort(["r0"])  # in flight, and ended for its client
    with Failing(core, {0: ("before", bug)}), contextlib.suppress(StepFailed):
        core.step()
    core.abort(["r0", "r1"])
    core.check_invariants()
    reasons = {}
    while core.has_work:
        reasons |= {d.request_id: d.finish_reason for d in core.step() if d.finish_reason}
    assert reasons in ({"r2": "length"}, {"r2": "stop"})
