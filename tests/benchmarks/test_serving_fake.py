"""The fake engine's core, its journal, and what is computed from both."""

from __future__ import annotations

import asyncio
from functools import partial
from types import SimpleNamespace

import pytest

from benchmarks.serving.fake import core as fake
from benchmarks.serving.fake.core import BLOCK_SIZE, TOTAL_BLOCKS, FakeCore
from benchmarks.serving.journal import Journal, JournalWriter
from deployments.engine_actor import EngineActor
from deployments.wire import Submission, decode_trunk_message, encode
from engine.config import EngineConfig
from engine.errors import InvalidRequest
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams


class Clock:
    """Stands still but for sleep."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(fake, "time", SimpleNamespace(monotonic=clock.monotonic, sleep=clock.sleep))
    return clock


def start(max_num_seqs=8, journal=None, max_model_len=64):
    return FakeCore(
        EngineConfig(max_num_seqs=max_num_seqs, max_model_len=max_model_len), 0.025, journal
    )


def request(request_id, prompt, tokens, done=()):
    params = SamplingParams(max_tokens=tokens)
    return EngineRequest(request_id, list(prompt), params, output_token_ids=list(done))


def run(core):
    got = {}
    while core.has_work:
        for delta in core.step():
            got.setdefault(delta.request_id, []).extend(delta.token_ids)
    return got


def test_repeats_the_prompt_up_to_max_tokens(clock):
    core = start()
    core.add(request("a", [7, 8, 9], 5))
    core.add(request("b", [4], 2))
    assert run(core) == {"a": [7, 8, 9, 7, 8], "b": [4, 4]}


def test_ends_at_the_models_length(clock):
    core = start(max_model_len=10)
    core.add(request("a", [1] * 7, None))
    assert len(run(core)["a"]) == 3


def test_goes_on_where_another_engine_stopped(clock):
    core = start()
    core.add(request("a", [7, 8, 9], 5, done=[7, 8]))
    assert run(core) == {"a": [9, 7, 8]}


def test_refuses_a_prompt_that_leaves_no_room(clock):
    core = start(max_model_len=10)
    for prompt in ([1] * 10, []):
        with pytest.raises(InvalidRequest):
            core.add(request("a", prompt, 1))
    assert not core.has_work


def test_requests_beyond_the_rows_wait_and_are_told_so(clock):
    core = start(max_num_seqs=2)
    for name in "abc":
        core.add(request(name, [1] * BLOCK_SIZE, 3))
    core.step()
    load = core.load()
    assert (load.num_running, load.num_waiting) == (2, 1)
    assert load.running_tokens == 2 * (BLOCK_SIZE + 1)
    assert load.waiting_tokens == BLOCK_SIZE
    assert load.free_blocks == TOTAL_BLOCKS - 2 * 2
    assert {len(tokens) for tokens in run(core).values()} == {2, 3}
    assert core.load().free_blocks == TOTAL_BLOCKS


def test_an_abort_ends_a_request_whether_it_runs_or_waits(clock):
    core = start(max_num_seqs=1)
    core.add(request("a", [1], 9))
    core.add(request("b", [1], 9))
    core.step()
    core.abort(["a", "b", "unknown"])
    assert not core.has_work


def test_a_failure_is_told_to_all(clock):
    core = start(max_num_seqs=1)
    core.add(request("a", [1], 9))
    core.step()
    core.add(request("b", [1], 9))
    assert [(d.request_id, d.error) for d in core.fail_all("no")] == [("a", "no"), ("b", "no")]
    assert not core.has_work


def test_the_hosts_work_hides_behind_the_device(clock, tmp_path):
    core = start(journal=tmp_path)
    core.add(request("a", [1], 5))
    for host_s in (0.0, 0.010, 0.060, 0.0, 0.0):
        clock.now += host_s
        core.step()
    # 10 ms of work shorten the wait; 60 ms are more than a step, so the device waits for the host.
    assert clock.slept == pytest.approx([0.025, 0.015, 0.0, 0.025, 0.025])
    gaps = Journal(tmp_path).steps(0.0, 1000.0)
    assert gaps == pytest.approx([0.025, 0.060, 0.025, 0.025])


def test_an_idle_device_begins_a_step_when_work_comes(clock):
    core = start()
    core.add(request("a", [1], 1))
    core.step()
    clock.now += 3.0
    core.add(request("b", [1], 1))
    core.step()
    assert clock.slept == pytest.approx([0.025, 0.025])


def test_the_journal_knows_when_each_token_was_due(clock, tmp_path):
    core = start(max_num_seqs=1, journal=tmp_path)
    core.add(request("a", [1], 2))
    core.add(request("b", [1], 3))
    run(core)
    journal = Journal(tmp_path)
    assert journal.times("a", 2) == pytest.approx([100.025, 100.050])
    assert journal.times("b", 3) == pytest.approx([100.075, 100.100, 100.125])
    assert journal.times("b", 4) is None
    assert journal.times("c", 1) is None


def test_the_journals_of_two_engines_make_one(tmp_path):
    for pid, (due, position) in enumerate([(1.0, 0), (7.0, 2)]):
        (tmp_path / f"engine-{pid}.journal").write_text(
            f"{due} r:{position}\n{due + 1}\n{due + 2}\n"
        )
    assert Journal(tmp_path).times("r", 5) == [1.0, 2.0, 7.0, 8.0, 9.0]


def test_a_journal_line_is_there_at_once(tmp_path):
    JournalWriter(tmp_path).write(1.25, [("r", 0)])
    assert Journal(tmp_path).times("r", 1) == [1.25]


async def test_runs_in_the_engine_actor(tmp_path):
    actor = EngineActor(
        EngineConfig(max_num_seqs=4), partial(FakeCore, step_s=0.001, journal=tmp_path)
    )
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
