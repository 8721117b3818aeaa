"""Watchdogs: what counts as a hang, who is told of one, and how late an event loop is."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from functools import partial
from pathlib import Path

import pytest

from deployments import crash_dump, engine_actor, engine_guard, engine_replica, trunk, watchdog
from deployments.engine_actor import EngineActor
from deployments.watchdog import (
    COMPILE_LIMIT_S,
    CPU_STALL_LIMIT_S,
    GPU_STALL_LIMIT_S,
    LAG_WARNING_S,
    WARNING_INTERVAL_S,
    LoopLag,
    Silence,
    StepWatch,
    WatchOptions,
    stall_limit,
)
from deployments.wire import Submission, decode_report, decode_trunk_message, encode
from engine.config import EngineConfig
from engine.loop import IDLE_WAKEUP_S, EngineLoop
from engine.outputs import TokenDelta
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams
from tests.deployments.fake_core import FakeCore, expected_tokens
from tests.deployments.plane import open_plane


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class HangingCore(FakeCore):
    """The first of its steps while `hangs` is set lasts until `end` is."""

    def __init__(self, config: EngineConfig, hangs: threading.Event, end: threading.Event) -> None:
        super().__init__(config, step_s=0.005)
        self._hangs, self._end = hangs, end

    def step(self) -> list[TokenDelta]:
        if self._hangs.is_set():
            self._hangs.clear()
            self._end.wait(30)
        return super().step()


@pytest.fixture
def hang(monkeypatch):
    """Events of a `HangingCore`, whose engine is given up after 1.5 s."""
    monkeypatch.setattr(watchdog, "CPU_STALL_LIMIT_S", 1.5)
    monkeypatch.setattr("engine.loop.IDLE_WAKEUP_S", 0.05)
    hangs, end = threading.Event(), threading.Event()
    hangs.set()
    yield hangs, end
    end.set()


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def request(request_id: str, max_tokens: int = 50) -> EngineRequest:
    params = SamplingParams(max_tokens=max_tokens, seed=0, stop=["a secret stop string"])
    return EngineRequest(request_id, [40961, 40962, 40963], params)


def looks(watch: StepWatch, clock: Clock, seconds: float, progress=1.0, compiling=False) -> bool:
    """Look every half second for so long; whether it stalled at the last look."""
    stalled = False
    for _ in range(round(seconds / 0.5)):
        clock.now += 0.5
        stalled = watch.stalled(progress, lambda: compiling)
    return stalled


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(watchdog, "LOOK_S", 0.5)
    return Clock()


def test_a_step_that_lasts_longer_than_the_limit_hangs(clock):
    watch = StepWatch(8.0, clock)
    watch.stalled(1.0, lambda: False)
    assert not looks(watch, clock, 8.0)
    assert looks(watch, clock, 0.5)


def test_progress_begins_the_time_anew(clock):
    watch = StepWatch(8.0, clock)
    for progress in range(10):
        assert not looks(watch, clock, 7.5, float(progress))


def test_compilation_has_a_limit_of_its_own(clock):
    watch = StepWatch(8.0, clock)
    watch.stalled(1.0, lambda: False)
    assert not looks(watch, clock, 7.0)
    assert not looks(watch, clock, COMPILE_LIMIT_S, compiling=True)
    assert not looks(watch, clock, 1.0)
    assert looks(watch, clock, 0.5)
    watch.stalled(2.0, lambda: False)
    assert looks(watch, clock, COMPILE_LIMIT_S + 0.5, 2.0, compiling=True)


def test_a_process_that_was_stopped_itself_accuses_nobody(clock):
    watch, silence = StepWatch(8.0, clock), Silence(clock)
    watch.stalled(1.0, lambda: False)
    clock.now += 3600
    assert not watch.stalled(1.0, lambda: False)
    assert silence.look() == 1.0
    silence.end()
    assert silence.seconds == 0.0


LOOK_S = watchdog.LOOK_S
KILL, ASK = watchdog.kill_process, watchdog.ask_for_stacks
"""The true ones, in production."""


@pytest.mark.parametrize("error", [ProcessLookupError, PermissionError])
@pytest.mark.parametrize("send", [KILL, ASK])
def test_a_process_that_cannot_be_reached_hinders_nothing(send, error, monkeypatch):
    def fail(pid: int, number: int) -> None:
        raise error

    monkeypatch.setattr("os.kill", fail)
    send(4711)


def test_the_limit_of_a_cpu_follows_its_speed():
    info = {"device": "cpu", "startup_seconds": {"warm-up": 0.1}, "max_num_batched_tokens": 1024}
    assert stall_limit(info) == CPU_STALL_LIMIT_S
    slow = info | {"startup_seconds": {"warm-up": 8.0}}
    assert stall_limit(slow) == 5 * 8.0 / 16 * 1024
    assert stall_limit(info | {"startup_seconds": {}}) == CPU_STALL_LIMIT_S


def test_the_limit_of_a_gpu_follows_the_largest_step():
    stages = {"kernels": 90.0, "largest step": 0.4, "warm-up": 8.0}
    info = {"device": "cuda:0", "startup_seconds": stages, "max_num_batched_tokens": 8192}
    assert stall_limit(info) == GPU_STALL_LIMIT_S
    assert stall_limit(info | {"startup_seconds": {"largest step": 7.0}}) == 5 * 7.0
    assert stall_limit(info | {"startup_seconds": {}}) == GPU_STALL_LIMIT_S


def test_what_a_step_takes_at_the_start_is_not_overdue():
    assert watchdog.OVERDUE_SHARE * watchdog.STEP_MARGIN > 1


def test_all_who_look_for_life_keep_one_promise():
    limits = {trunk.SILENCE_LIMIT_S, engine_replica.SILENCE_LIMIT_S, engine_guard.DEAF_LIMIT_S}
    assert limits == {watchdog.SILENCE_LIMIT_S} == {GPU_STALL_LIMIT_S}
    assert IDLE_WAKEUP_S < watchdog.SILENCE_LIMIT_S / 2
    heartbeat_s = engine_actor.HEARTBEAT_S
    assert watchdog.SILENCE_LIMIT_S + heartbeat_s + watchdog.EXIT_DELAY_S + LOOK_S <= 10


def test_a_step_is_overdue_long_before_it_hangs(clock):
    watch = StepWatch(8.0, clock)
    watch.stalled(1.0, lambda: False)
    looks(watch, clock, 2.0)
    assert not watch.overdue(1.0)
    looks(watch, clock, 10.0, compiling=True)
    assert not watch.overdue(1.0)
    looks(watch, clock, 0.5)
    assert watch.overdue(1.0)
    assert not watch.overdue(2.0)  # it has ended since


async def test_the_load_tells_of_a_step_that_is_overdue(hang, monkeypatch, ended):
    monkeypatch.setattr(watchdog, "OVERDUE_SHARE", 0.005)
    monkeypatch.setattr(engine_actor, "HEARTBEAT_S", 0.02)
    start_core = partial(HangingCore, hangs=hang[0], end=hang[1])
    actor = EngineActor(EngineConfig(), start_core, WatchOptions(stall_limit_s=30.0))
    await actor.start()
    await actor.submit(encode([Submission("x", request("r"))]))
    trunk_of_x = actor.subscribe("x")
    async with asyncio.timeout(10):
        async for data in trunk_of_x:
            if decode_trunk_message(data).load.overdue:
                break
            await actor.acknowledge("x", 1)
        hang[1].set()
        async for data in trunk_of_x:
            message = decode_trunk_message(data)
            if message.deltas and message.deltas[-1].finish_reason:
                break
            await actor.acknowledge("x", 1)
    assert not message.load.overdue
    await trunk_of_x.aclose()
    await actor.drain()


async def test_an_engine_that_is_debugged_may_stand_still(hang, monkeypatch, ended):
    monkeypatch.setattr(engine_guard, "DEAF_LIMIT_S", 0.1)
    start_core = partial(HangingCore, hangs=hang[0], end=hang[1])
    actor = EngineActor(EngineConfig(), start_core, WatchOptions(stall_limit_s=0))
    await actor.start()
    reports = actor.watch(4711)
    await anext(reports)
    await actor.submit(encode([Submission("x", request("r", 1))]))
    await asyncio.sleep(0.5)
    assert ended == []
    hang[1].set()
    async with asyncio.timeout(10):
        while not (report := decode_report(await anext(reports))).ended:
            pass
    assert report.dead is None
    await actor.drain()


async def test_a_gauge_that_fails_ends_no_engine(monkeypatch, ended):
    class Broken:
        def __init__(self, *_: object, **__: object) -> None: ...

        def set(self, *_: object) -> None:
            raise RuntimeError("no metrics agent")

    monkeypatch.setattr("ray.util.metrics.Gauge", Broken)
    monkeypatch.setattr(watchdog, "LAG_LOOK_S", 0.01)
    actor = EngineActor(EngineConfig(), FakeCore)
    await actor.start()
    await asyncio.sleep(0.1)
    assert not actor._measurer.done()  # it goes on measuring
    assert decode_report(await anext(actor.watch())).dead is None
    assert ended == []
    await actor.drain()


async def test_a_hanging_step_is_told_on_trunk_and_watch_and_ends_the_process(
    hang, ended, tmp_path, monkeypatch
):
    monkeypatch.setattr(watchdog, "EXIT_DELAY_S", 0.0)
    actor = EngineActor(EngineConfig(), partial(HangingCore, hangs=hang[0], end=hang[1]))
    await actor.start()
    trunk, watch = actor.subscribe("x"), actor.watch()
    await actor.submit(encode([Submission("x", request("r"))]))
    async with asyncio.timeout(10):
        assert not [d async for data in trunk for d in decode_trunk_message(data).deltas]
        reports = [decode_report(data) async for data in watch]
    assert "raise stall_limit_s" in (reports[-1].dead or "")
    await until(lambda: ended == ["itself"])
    text = one_dump(tmp_path).read_text()
    dump = json.loads(text)
    assert dump["reason"] == "stall" and dump["state"]["load"]["num_running"] == 1
    stacks = [frames for name, frames in dump["threads"].items() if "engine-loop" in name]
    assert any("self._end.wait(30)" in stack[-2] + stack[-3] for stack in stacks)
    assert not any(secret in text for secret in ("40961", "secret stop"))
    hang[1].set()
    await actor.drain()


async def test_a_death_is_told_before_it_is_written_down(monkeypatch, hold_dump, ended):
    """The folder may be slow: nobody waits for it, but the dump is written before the end."""
    monkeypatch.setattr(watchdog, "EXIT_DELAY_S", 0.0)
    may_write = hold_dump(engine_guard, ended)
    actor = EngineActor(EngineConfig(), partial(FakeCore, die_at_token=2))
    await actor.start()
    trunk_of_x, watch = actor.subscribe("x"), actor.watch()
    await actor.submit(encode([Submission("x", request("r"))]))
    async with asyncio.timeout(5):
        deltas = [d async for data in trunk_of_x for d in decode_trunk_message(data).deltas]
        assert deltas[-1].finish_reason == "error"
        while decode_report(await anext(watch)).dead is None:
            pass
        assert ended == []
        may_write.set()
        await until(lambda: ended == ["written", "itself"])
    await actor.drain()


async def test_a_write_that_blocks_keeps_no_process(monkeypatch, hold_dump, ended):
    monkeypatch.setattr(watchdog, "EXIT_DELAY_S", 0.0)
    monkeypatch.setattr(crash_dump, "WRITE_LIMIT_S", 0.1)
    may_write = hold_dump(engine_guard, ended)
    actor = EngineActor(EngineConfig(), FakeCore)
    await actor.start()
    actor._guard.end(RuntimeError("told to die"))
    async with asyncio.timeout(5):
        await until(lambda: ended == ["itself"])
    may_write.set()
    await actor.drain()


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise ValueError("its message cannot be told")


@pytest.mark.parametrize("broken", ["write_crash_dump", "describe_error", "describe_state"])
async def test_an_engine_that_cannot_be_described_ends_all_the_same(broken, monkeypatch, ended):
    def fail(*_: object, **__: object) -> None:
        raise OSError("stale file handle")

    monkeypatch.setattr(watchdog, "EXIT_DELAY_S", 0.0)
    monkeypatch.setattr(engine_guard, broken, fail)
    actor = EngineActor(EngineConfig(), FakeCore)
    await actor.start()
    watch = actor.watch()
    await anext(watch)
    actor._guard.end(Unspeakable())
    assert [decode_report(data).dead async for data in watch][-1] == "Unspeakable"
    await until(lambda: ended == ["itself"])
    await actor.drain()


def one_dump(folder: Path) -> Path:
    (path,) = folder.glob("trunkline-crash-*.json")
    return path


async def test_requests_of_a_hanging_engine_go_on_elsewhere(hang, monkeypatch, ended):
    monkeypatch.setattr("tests.deployments.plane.FakeCore", HangingCore)
    async with open_plane(2, hangs=hang[0], end=hang[1]) as plane:
        wires = [request(f"r{i}") for i in range(4)]
        with plane.client.start(wires) as generation:
            async with asyncio.timeout(10):
                async for _ in generation:
                    pass
        assert [w.output_token_ids for w in wires] == [
            expected_tokens([40961, 40962, 40963], 50)
        ] * 4
        hang[1].set()


async def test_an_idle_engine_does_not_hang(hang, ended):
    hang[0].clear()
    actor = EngineActor(EngineConfig(), FakeCore, WatchOptions(stall_limit_s=1.5))
    await actor.start()
    await asyncio.sleep(2.0)
    assert decode_report(await anext(actor.watch())).dead is None
    await actor.drain()


async def test_a_replica_that_reads_no_reports_is_killed(monkeypatch, ended):
    monkeypatch.setattr(engine_guard, "DEAF_LIMIT_S", 0.1)
    actor = EngineActor(EngineConfig(), FakeCore)
    await actor.start()
    await asyncio.sleep(0.3)
    assert ended == []  # nobody has begun to read
    reports = actor.watch(4711)
    await anext(reports)
    await until(lambda: ended == [("killed", 4711)])
    await actor.drain()


async def test_nothing_is_sent_to_an_engine_whose_replica_is_silent(monkeypatch, ended):
    """It would never get there, though the engine itself lives."""
    monkeypatch.setattr(engine_guard, "SILENT_S", 1.4)  # reports come every second
    actor = EngineActor(EngineConfig(), FakeCore)
    await actor.start()
    reports, trunk_of_x = actor.watch(4711), actor.subscribe("x")
    await anext(reports)
    assert not decode_trunk_message(await anext(trunk_of_x)).load.overdue
    async with asyncio.timeout(10):
        while not decode_trunk_message(await anext(trunk_of_x)).load.overdue:
            await actor.acknowledge("x", 1)
        await anext(reports)
        while decode_trunk_message(await anext(trunk_of_x)).load.overdue:
            await actor.acknowledge("x", 1)
    await trunk_of_x.aclose()
    await actor.drain()


def test_the_compiler_is_known_by_the_stack_of_the_loop():
    began, end = threading.Event(), threading.Event()

    class CompilingCore(FakeCore):
        def step(self) -> list[TokenDelta]:
            exec(
                "began.set(); end.wait(10)",
                {"__name__": "triton.compiler.compiler", "began": began, "end": end},
            )
            return super().step()

    loop = EngineLoop(CompilingCore(EngineConfig()), lambda *_: None, lambda _: None)
    assert not loop.compiling
    loop.submit([request("r", 1)])
    began.wait(10)
    assert loop.compiling
    end.set()
    loop.stop()
    assert not loop.compiling


async def test_lag_of_an_event_loop_is_measured():
    recorded: list[float] = []
    lag = LoopLag("a test", recorded.append)
    task = asyncio.create_task(lag.run())
    await asyncio.sleep(0)
    threading.Event().wait(0.6)  # blocks the loop
    await until(lambda: recorded)
    task.cancel()
    assert recorded[-1] == lag.worst_s >= 0.3


def test_warnings_of_lag_are_rare(caplog):
    lag = LoopLag("a test", lambda _: None, logging.getLogger("tests.lag"))
    lag.take(LAG_WARNING_S / 2, 0.0)
    assert not caplog.records
    for now in (1.0, 2.0, WARNING_INTERVAL_S, WARNING_INTERVAL_S + 1.0):
        lag.take(2 * LAG_WARNING_S, now)
    assert len(caplog.records) == 2
    for now in range(100):
        lag.take(0.0, float(now))
    assert lag.worst_s == 0.0
