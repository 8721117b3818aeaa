"""The engine's Serve replica with its actor in the same event loop, without Ray."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError

from deployments import crash_dump, engine_actor, engine_guard, engine_replica, watchdog
from deployments.engine_actor import EngineActor
from deployments.engine_replica import EngineReplica
from deployments.placement import Booking
from deployments.watchdog import WatchOptions
from deployments.wire import Submission, encode
from engine.config import EngineConfig
from engine.errors import EngineDead
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams
from tests.deployments.fake_core import FakeCore


class LocalMethod:
    """`actor.method.remote(...)` of an actor in this loop."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method

    def options(self, **_: Any) -> LocalMethod:
        return self

    def remote(self, *args: Any) -> Any:
        result = self._method(*args)
        return _refs(result) if hasattr(result, "__aiter__") else asyncio.ensure_future(result)


async def _refs(values: AsyncIterator[Any]) -> AsyncIterator[asyncio.Future[Any]]:
    async for value in values:
        ref = asyncio.get_running_loop().create_future()
        ref.set_result(value)
        yield ref


class LocalActor:
    """Stands in for Ray's handle of an `EngineActor`."""

    def __init__(self, actor: EngineActor) -> None:
        self.actor = actor

    def __getattr__(self, name: str) -> LocalMethod:
        return LocalMethod(getattr(self.actor, name))


@pytest.fixture
def local(monkeypatch, ended):
    """Lets replicas be made without Ray; holds what they have ended."""

    def remote(actor_class: type) -> Any:
        made = SimpleNamespace(remote=lambda *args: LocalActor(actor_class(*args)))
        return SimpleNamespace(options=lambda **_: made)

    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="r1"))
    monkeypatch.setattr(engine_replica.ray, "remote", remote)
    monkeypatch.setattr(engine_replica.serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(
        engine_replica, "EngineMetrics", lambda _: SimpleNamespace(record=lambda _: None)
    )
    monkeypatch.setattr(watchdog, "EXIT_DELAY_S", 0.0)
    for module in (engine_replica, engine_actor):  # this process is the test's
        monkeypatch.setattr(module, "configure_logging", lambda _: None)
    return ended


class Replica(EngineReplica):
    def __del__(self) -> None:
        """Only Serve can call one that is a coroutine."""


async def start(
    start_core: Callable[[EngineConfig], Any] = FakeCore, stall_limit_s: float | None = None
) -> EngineReplica:
    replica = Replica.__new__(Replica)
    await replica.__init__("m", EngineConfig(), {}, start_core, WatchOptions(stall_limit_s))
    return replica


async def stop(replica: EngineReplica) -> None:
    for task in replica._tasks:
        task.cancel()
    await replica._actor.actor.drain()


def load_slowly(config: EngineConfig, seconds: float) -> FakeCore:
    time.sleep(seconds)
    return FakeCore(config)


async def test_slow_load_does_not_count_as_silence(local, monkeypatch):
    monkeypatch.setattr(engine_replica, "SILENCE_LIMIT_S", 0.3)
    monkeypatch.setattr(engine_replica, "START_SILENCE_LIMIT_S", 0.3)
    replica = await start(partial(load_slowly, seconds=0.5))
    await replica.check_health()
    await stop(replica)


async def test_an_engine_that_stops_while_it_starts_is_given_up(local, monkeypatch):
    async def stopped(_: EngineActor) -> None:
        await asyncio.Event().wait()

    def load(config: EngineConfig) -> FakeCore:
        may_end.wait()
        return FakeCore(config)

    may_end = threading.Event()
    killed: list[Any] = []
    monkeypatch.setattr(engine_replica, "START_SILENCE_LIMIT_S", 0.1)
    monkeypatch.setattr(EngineActor, "live", stopped)
    monkeypatch.setattr(engine_replica.ray, "kill", killed.append)
    replica = Replica.__new__(Replica)
    try:
        with pytest.raises(EngineDead, match="showed no life"):
            await replica.__init__("m", EngineConfig(), {}, load)
        assert killed == [replica._actor]
        await EngineReplica.__del__(replica)
    finally:
        may_end.set()


async def test_report_that_cannot_be_read_ends_the_replica(local, monkeypatch):
    async def garbage(_: EngineActor, replica_pid: int) -> AsyncIterator[bytes]:
        yield b"no report"

    monkeypatch.setattr(EngineActor, "watch", garbage)
    replica = await start()
    await until(lambda: len(local) == 2)  # the dump is written in between
    assert local == [("killed", replica.info["pid"]), "itself"]
    with pytest.raises(EngineDead, match="ValidationError"):
        await replica.check_health()
    await stop(replica)


async def never(_: EngineActor, replica_pid: int = 0) -> AsyncIterator[bytes]:
    await asyncio.Event().wait()
    yield b""


async def test_a_replica_that_cannot_write_a_dump_ends_all_the_same(local, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("stale file handle")

    monkeypatch.setattr(EngineActor, "watch", never)
    monkeypatch.setattr(engine_replica, "write_crash_dump", fail)
    monkeypatch.setattr(engine_replica, "SILENCE_LIMIT_S", 0.1)
    replica = await start()
    await until(lambda: local[-2:] == [("killed", replica.info["pid"]), "itself"])
    await stop(replica)


async def test_a_replica_whose_dump_blocks_fails_its_calls_at_once_and_ends(
    local, monkeypatch, hold_dump
):
    monkeypatch.setattr(EngineActor, "watch", never)
    may_write = hold_dump(engine_replica, local)
    monkeypatch.setattr(engine_replica, "SILENCE_LIMIT_S", 0.1)
    monkeypatch.setattr(crash_dump, "WRITE_LIMIT_S", 0.5)
    replica = await start()
    with pytest.raises(EngineDead, match="not reported"):
        await run(replica, "a", 10**6)
    assert "written" not in local and "itself" not in local
    pid = replica.info["pid"]
    await until(lambda: local == [("asked", pid), ("killed", pid), "itself"])
    may_write.set()
    await stop(replica)


async def test_an_engine_that_writes_its_dump_is_not_killed_meanwhile(local, hold_dump):
    may_write = hold_dump(engine_guard, local)
    replica = await start(partial(FakeCore, die_at_token=1))
    await submit(replica, "a")
    with pytest.raises(EngineDead, match="told to die"):
        await replica.generate(Booking("of another", 2))
    assert local == []
    may_write.set()
    await until(lambda: len(local) == 4)
    assert local[0] == "written"
    await stop(replica)


async def test_without_watchdogs_everything_may_stand_still(local, monkeypatch):
    async def stopped(_: EngineActor) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(EngineActor, "watch", never)
    monkeypatch.setattr(EngineActor, "live", stopped)
    monkeypatch.setattr(engine_replica, "SILENCE_LIMIT_S", 0.1)
    monkeypatch.setattr(engine_replica, "START_SILENCE_LIMIT_S", 0.1)
    replica = await start(partial(load_slowly, seconds=0.3), stall_limit_s=0)
    await asyncio.sleep(0.3)
    await replica.check_health()
    assert local == []
    await stop(replica)


async def test_metrics_that_fail_end_no_request(local, monkeypatch, caplog):
    def fail(_: Any) -> None:
        raise RuntimeError("no metrics agent")

    monkeypatch.setattr(engine_replica, "EngineMetrics", lambda _: SimpleNamespace(record=fail))
    replica = await start()
    ends = [run(replica, name) for name in ("a", "b")]
    assert await asyncio.gather(*ends) == ["length", "length"]
    await replica.check_health()
    assert caplog.text.count("RuntimeError: no metrics agent") == 1
    assert local == []
    await stop(replica)


async def test_a_silent_engine_is_killed_and_the_replica_ends(local, monkeypatch, tmp_path):
    monkeypatch.setattr(EngineActor, "watch", never)
    monkeypatch.setattr(engine_replica, "SILENCE_LIMIT_S", 0.1)
    replica = await start()
    call = asyncio.ensure_future(run(replica, "a", 10**6))
    await until(lambda: len(local) == 3)
    pid = replica.info["pid"]
    assert local == [("asked", pid), ("killed", pid), "itself"]
    with pytest.raises(EngineDead, match="not reported"):
        await call
    with pytest.raises(EngineDead, match="not reported"):
        await replica.check_health()
    (dump,) = tmp_path.glob("trunkline-crash-*.json")
    found = json.loads(dump.read_text())
    assert (found["reason"], found["requests"]) == ("silence", ["a"])
    await stop(replica)


async def test_the_engines_own_death_ends_both_and_is_dumped_once(local, tmp_path):
    replica = await start(partial(FakeCore, die_at_token=1))
    with pytest.raises(EngineDead):
        await run(replica, "b")
        await run(replica, "c")
    await until(lambda: local.count("itself") == 2)
    assert ("killed", replica.info["pid"]) in local
    assert len(list(tmp_path.glob("trunkline-crash-*.json"))) == 1
    with pytest.raises(EngineDead, match="told to die"):
        await replica.check_health()
    await stop(replica)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


async def submit(replica: EngineReplica, request_id: str, max_tokens: int = 3) -> None:
    """Send a request to the engine, as the ingress does."""
    params = SamplingParams(max_tokens=max_tokens, seed=0)
    item = Submission("nobody", EngineRequest(request_id, [1, 2], params))
    await replica._actor.actor.submit(encode([item]))


async def run(replica: EngineReplica, request_id: str, max_tokens: int = 3) -> str:
    """The finish reason of a request."""
    await submit(replica, request_id, max_tokens)
    return await replica.generate(Booking(request_id, 2))


async def test_a_call_that_comes_after_the_end_of_its_request_ends_at_once(local, monkeypatch):
    monkeypatch.setattr(engine_replica, "EARLY_ENDS", 2)
    replica = await start()
    for name in ("a", "b", "c"):
        await submit(replica, name)
    await until(lambda: list(replica._early_ends) == ["b", "c"])  # a is the oldest
    assert await replica.generate(Booking("b", 2)) == "length"
    assert list(replica._early_ends) == ["c"] and not replica._ends
    await stop(replica)


async def test_a_call_that_is_cancelled_ends_its_request(local):
    replica = await start(partial(FakeCore, step_s=0.01))
    call = asyncio.ensure_future(run(replica, "a", 10**6))
    await until(lambda: replica._ends)
    call.cancel()
    await asyncio.wait([call])
    core = replica._actor.actor._loop._core
    await until(lambda: not core.has_work)
    assert not replica._ends
    await stop(replica)


def hiccup(*_: Any) -> Any:
    """What a call raises that could not be made for a moment, of an engine that lives on."""
    raise ActorUnavailableError("it is temporarily unavailable", None)


async def test_a_call_that_fails_for_a_moment_is_no_end_of_looking_for_lost_calls(
    local, monkeypatch, caplog
):
    async def missing(actor: EngineActor, request_ids: list[str]) -> list[str]:
        return failures.pop()() if failures else await ask(actor, request_ids)

    failures, ask = [hiccup], EngineActor.missing
    monkeypatch.setattr(engine_replica, "LOST_CALLS_S", 0.05)
    monkeypatch.setattr(EngineActor, "missing", missing)
    replica = await start()
    async with asyncio.timeout(5):
        assert await replica.generate(Booking("lost on the way", 2)) == "abort"
    assert not failures and "temporarily unavailable" in caplog.text
    await stop(replica)


async def test_a_call_that_fails_for_a_moment_is_no_silence_of_an_engine_that_starts(
    local, monkeypatch
):
    async def live(_: EngineActor) -> None:
        await asyncio.sleep(0.01)
        if failures:
            failures.pop()()

    failures = [hiccup]
    monkeypatch.setattr(engine_replica, "START_SILENCE_LIMIT_S", 0.5)
    monkeypatch.setattr(engine_replica.ray, "kill", lambda _: None)
    monkeypatch.setattr(EngineActor, "live", live)
    replica = await start(partial(load_slowly, seconds=1.5))
    assert not failures
    await stop(replica)


async def test_replica_whose_engine_did_not_start_ends_without_another_error(local):
    def fail(_: EngineConfig) -> FakeCore:
        raise RuntimeError("damaged")

    replica = Replica.__new__(Replica)
    with pytest.raises(RuntimeError, match="damaged"):
        await replica.__init__("m", EngineConfig(), {}, fail)
    await EngineReplica.__del__(replica)


async def test_of_two_calls_for_a_request_the_later_one_hears_of_the_end(local):
    replica = await start()
    first, second = (asyncio.ensure_future(replica.generate(Booking("a", 2))) for _ in range(2))
    with pytest.raises(EngineDead, match="made again"):
        await first
    await submit(replica, "a")
    assert await second == "length"
    assert not replica._ends
    await stop(replica)


async def test_calls_for_requests_that_the_engine_does_not_have_end(local, monkeypatch):
    monkeypatch.setattr(engine_replica, "LOST_CALLS_S", 0.05)
    replica = await start(partial(FakeCore, step_s=0.01))
    running = asyncio.ensure_future(run(replica, "a", 10**6))
    async with asyncio.timeout(5):
        assert await replica.generate(Booking("lost on the way", 2)) == "abort"
    await asyncio.sleep(0.2)
    assert not running.done()
    running.cancel()
    await stop(replica)
