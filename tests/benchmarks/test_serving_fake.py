"""The fake engine, its journal, and what is computed from both."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from benchmarks.serving.fake import runner
from benchmarks.serving.fake.core import StartFakeEngine
from benchmarks.serving.journal import Admission, Journal, JournalWriter
from deployments.engine_actor import EngineActor
from deployments.wire import Submission, decode_trunk_message, encode
from engine.config import EngineConfig
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams

STEP_S = 0.025


class Clock:
    """Stands still but for sleep."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return self.now / 10

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    names = {name: getattr(clock, name) for name in ("monotonic", "thread_time", "sleep")}
    monkeypatch.setattr(runner, "time", SimpleNamespace(**names))
    return clock


def start(journal=None, token_s=0.0, **options):
    options = {"max_num_seqs": 8, "max_model_len": 64, "async_scheduling": True, **options}
    return StartFakeEngine(STEP_S, token_s, journal)(EngineConfig(device="cpu", **options))


def request(request_id, prompt, tokens, done=()):
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, seed=0)
    return EngineRequest(request_id, list(prompt), params, output_token_ids=list(done))


def run(core):
    got = {}
    while core.has_work:
        for delta in core.step():
            got.setdefault(delta.request_id, []).extend(delta.token_ids)
    core.check_invariants()
    return got


@pytest.mark.parametrize("ahead", [False, True])
def test_repeats_the_prompt_up_to_max_tokens(clock, ahead):
    core = start(async_scheduling=ahead)
    core.add(request("a", [7, 8, 9], 5))
    core.add(request("b", [4], 2))
    assert run(core) == {"a": [7, 8, 9, 7, 8], "b": [4, 4]}


def test_goes_on_where_another_engine_stopped(clock):
    core = start()
    core.add(request("a", [7, 8, 9], 5, done=[7, 8]))
    assert run(core) == {"a": [9, 7, 8]}


def test_preempted_requests_say_the_same(clock, tmp_path):
    core = start(tmp_path, force_preempt_every=3)
    prompts = {name: [i, i + 1, i + 2] for i, name in enumerate("abcd")}
    for name, prompt in prompts.items():
        core.add(request(name, prompt, 20))
    expected = {name: [prompt[i % 3] for i in range(20)] for name, prompt in prompts.items()}
    assert run(core) == expected
    journal = Journal(tmp_path)
    assert core.load().num_preemptions == sum(
        len(admissions) - 1 for admissions in journal.engines[0].admissions.values()
    )
    for name in prompts:
        times = journal.times(name, 20)
        assert times == sorted(set(times))


def test_the_cache_and_its_evictions_are_real(clock, tmp_path):
    core = start(tmp_path, num_kvcache_blocks=9, max_model_len=128)
    first, second = list(range(100)), list(range(200, 300))
    for name, prompt in (("a", first), ("b", first), ("c", second), ("d", first)):
        core.add(request(name, prompt, 2))
        run(core)
    assert (core.load().prefix_queries, core.load().prefix_hits) == (400, 96 + 16)
    (engine,) = Journal(tmp_path).engines
    cached = [admission.cached_tokens for (admission,) in engine.admissions.values()]
    assert cached == [0, 96, 0, 16]


def test_a_prefill_takes_its_time(clock):
    core = start(token_s=0.001)
    core.add(request("a", [1] * 40, 3))
    run(core)
    assert clock.slept == pytest.approx([STEP_S + 0.040, STEP_S, STEP_S])


def test_the_hosts_work_hides_behind_the_device(clock, tmp_path):
    core = start(tmp_path)
    core.add(request("a", [1], 5))
    core.step()  # the first is under way
    for host_s in (0.0, 0.010, 0.060, 0.0, 0.0):
        clock.now += host_s
        core.step()
    # 10 ms of work shorten the wait. During 60 ms the step in flight ends; the next begins with
    # the launch after them.
    assert clock.slept == pytest.approx([0.025, 0.015, 0.0, 0.025, 0.025])
    gaps = Journal(tmp_path).steps(0.0, 1000.0)
    assert gaps == pytest.approx([0.025, 0.025, 0.060, 0.025])


def test_an_idle_device_begins_a_step_when_work_comes(clock):
    core = start()
    core.add(request("a", [1], 1))
    run(core)
    clock.now += 3.0
    core.add(request("b", [1], 1))
    run(core)
    assert clock.slept == pytest.approx([0.025, 0.025])


def test_the_journal_knows_when_each_token_was_due(clock, tmp_path):
    core = start(tmp_path, max_num_seqs=1)
    core.add(request("a", [1], 2))
    core.add(request("b", [1], 3))
    run(core)
    journal = Journal(tmp_path)
    assert journal.times("a", 2) == pytest.approx([100.025, 100.050])
    assert journal.times("b", 3) == pytest.approx([100.075, 100.100, 100.125])
    assert journal.times("b", 4) is None
    assert journal.times("c", 1) is None


def test_the_journal_follows_a_prefill_in_pieces(clock, tmp_path):
    core = start(tmp_path, max_num_batched_tokens=16)
    core.add(request("a", [1] * 40, 2))
    run(core)
    assert Journal(tmp_path).times("a", 2) == pytest.approx([100.075, 100.100])


def test_the_journals_of_two_engines_make_one(tmp_path):
    for pid, (due, position) in enumerate([(1.0, 0), (7.0, 2)]):
        (tmp_path / f"engine-{pid}.journal").write_text(
            f"{due} {pid}.5 +r:3:{pid} r:{position}\n{due + 1} {pid}.75\n{due + 2} {pid}.75\n"
        )
    journal = Journal(tmp_path)
    assert journal.times("r", 5) == [1.0, 2.0, 7.0, 8.0, 9.0]
    assert journal.engines[1].admissions == {"r": [Admission("r", 3, 1)]}
    assert journal.cpu(0.0, 2.5) == 0.75
    assert journal.cpu(1.5, 8.0) == 0.25 + 1.75


def test_a_journal_line_is_there_at_once(tmp_path):
    JournalWriter(tmp_path).write(1.25, 0.5, [("r", 0)], [Admission("r", 9, 8)])
    journal = Journal(tmp_path)
    assert journal.times("r", 1) == [1.25]
    assert journal.engines[0].admissions == {"r": [Admission("r", 9, 8)]}


async def test_runs_in_the_engine_actor(tmp_path):
    config = EngineConfig(max_num_seqs=4, async_scheduling=True)
    actor = EngineActor(config, StartFakeEngine(0.001, journal=tmp_path))
    info = await actor.start()
    assert info["max_model_len"] > 0
    await actor.submit(encode([Submission("me", request("a", [5, 6], 7))]))
    tokens: list[int] = []
    async with asyncio.timeout(10):
        async for message in actor.subscribe("me"):
            for delta in decode_trunk_message(message).deltas:
                tokens += delta.token_ids
            if len(tokens) == 7:
                break
    await actor.drain()
    assert tokens == [5, 6, 5, 6, 5, 6, 5]
    assert len(Journal(tmp_path).times("a", 7)) == 7
