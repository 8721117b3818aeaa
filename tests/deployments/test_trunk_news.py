"""What the trunk tells beside tokens: which bookings the load counts, and what others sent."""

from __future__ import annotations

import asyncio
import threading
from functools import partial

import pytest

from deployments import engine_actor, subscriber
from deployments.engine_actor import EngineActor
from deployments.journey import Journey
from deployments.wire import Submission, TrunkMessage, decode_trunk_message, encode
from engine import loop
from engine.config import EngineConfig
from engine.outputs import TokenDelta
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams
from tests.deployments.fake_core import FakeCore
from tests.deployments.plane import open_plane


class SteppedCore(FakeCore):
    """Each step begins and ends when the test says so."""

    def __init__(self, config: EngineConfig, began: threading.Semaphore, end: threading.Semaphore):
        super().__init__(config)
        self._began, self._end = began, end

    def step(self) -> list[TokenDelta]:
        self._began.release()
        self._end.acquire()
        return super().step()


def request(request_id: str, prompt: list[int] | None = None, max_tokens: int = 100_000):
    params = SamplingParams(max_tokens=max_tokens, seed=0)
    return EngineRequest(request_id, prompt or [1, 2, 3], params)


async def submit(actor: EngineActor, subscriber: str, *requests: EngineRequest, blocks=()) -> None:
    await actor.submit(encode([Submission(subscriber, each, list(blocks)) for each in requests]))


def be_quiet(monkeypatch) -> None:
    """Leave out what comes by itself once a second."""
    monkeypatch.setattr(engine_actor, "HEARTBEAT_S", 1000)
    monkeypatch.setattr(loop, "IDLE_WAKEUP_S", 1000)


async def next_step(trunk, step: int) -> TrunkMessage:
    async for data in trunk:
        message = decode_trunk_message(data)
        if message.load.step >= step:
            return message
    raise AssertionError("the trunk ended")


async def test_request_is_reflected_by_the_very_load_that_counts_it():
    began, end = threading.Semaphore(0), threading.Semaphore(0)
    actor = EngineActor(EngineConfig(max_num_seqs=8), partial(SteppedCore, began=began, end=end))
    await actor.start()
    trunk = actor.subscribe("x")
    await submit(actor, "x", request("a"))
    began.acquire()
    await submit(actor, "y", request("other"))
    await submit(actor, "x", request("b"), request("c"))  # while a step runs
    end.release()
    message = await next_step(trunk, 1)
    assert (message.load.num_running, message.reflected) == (1, ["a"])
    began.acquire()
    end.release()
    message = await next_step(trunk, 2)
    assert (message.load.num_running, message.reflected) == (4, ["b", "c"])
    end.release(1000)
    await actor.drain()


async def test_all_learn_at_once_that_an_engine_has_become_idle(monkeypatch):
    """Else a burst right afterwards would avoid the engines that others used last."""
    be_quiet(monkeypatch)
    began, end = threading.Semaphore(0), threading.Semaphore(0)
    actor = EngineActor(EngineConfig(max_num_seqs=8), partial(SteppedCore, began=began, end=end))
    await actor.start()
    trunk = actor.subscribe("x")
    mine, other = request("mine", max_tokens=1), request("of another", max_tokens=2)
    await actor.submit(encode([Submission("x", mine), Submission("y", other)]))
    end.release()
    assert (await next_step(trunk, 1)).load.num_running == 1
    end.release()
    async with asyncio.timeout(10):
        assert (await next_step(trunk, 2)).load.num_running == 0
    await actor.drain()


@pytest.mark.parametrize("interval_s", [0.0, 0.05, 1000])
async def test_an_engine_that_is_idle_again_and_again_says_so_now_and_then(monkeypatch, interval_s):
    """Requests of one step each would else be a storm of messages to those that sent none."""
    be_quiet(monkeypatch)
    monkeypatch.setattr(engine_actor, "LOAD_INTERVAL_S", 1000)
    monkeypatch.setattr(engine_actor, "IDLE_INTERVAL_S", interval_s)
    actor = EngineActor(EngineConfig(max_num_seqs=8), FakeCore)
    await actor.start()
    mine, others = actor.subscribe("x"), actor.subscribe("y")
    await anext(mine), await anext(others)
    told: list[int] = []
    reading = asyncio.create_task(read_steps(others, told))
    for number in range(10):
        await submit(actor, "x", request(f"r{number}", max_tokens=1))
        await next_step(mine, number + 1)
    if interval_s == 1000:
        assert told == []
    else:
        async with asyncio.timeout(10):
            while told[-1:] != [10]:
                await asyncio.sleep(0.005)
    reading.cancel()
    await actor.drain()


async def read_steps(trunk, told: list[int]) -> None:
    async for data in trunk:
        told.append(decode_trunk_message(data).load.step)


async def test_refused_and_aborted_requests_do_not_upset_the_count():
    actor = EngineActor(EngineConfig(max_num_seqs=8), partial(FakeCore, step_s=0.001))
    await actor.start()
    trunk = actor.subscribe("x")
    await actor.abort(["early"])
    await submit(actor, "x", request("long", [1] * 5000), request("early"), request("a"))
    await submit(actor, "x", request("b"))
    await actor.abort(["b"])
    await submit(actor, "x", request("c"))
    reflected: list[str] = []
    async for data in trunk:
        message = decode_trunk_message(data)
        reflected += message.reflected
        if "c" in reflected:
            break
    assert reflected == ["long", "a", "b", "c"]
    assert message.load.num_running == 2
    await actor.drain()


async def test_others_hear_which_blocks_were_sent(actor):
    mine, others = actor.subscribe("x"), actor.subscribe("y")
    await anext(mine), await anext(others)
    await submit(actor, "x", request("a"), blocks=[b"1", b"2"])
    async with asyncio.timeout(5):
        while not (heard := decode_trunk_message(await anext(others)).heard):
            await actor.acknowledge("y", 1)
    assert heard == [[b"1", b"2"]]
    assert not decode_trunk_message(await anext(mine)).heard


async def test_what_a_slow_reader_hears_is_bounded(actor, monkeypatch):
    monkeypatch.setattr(subscriber, "HEARD_KEPT", 3)
    others = actor.subscribe("y")
    await anext(others)
    for number in range(10):
        await submit(actor, "x", request(f"r{number}", max_tokens=1), blocks=[bytes([number])])
    heard = decode_trunk_message(await anext(others)).heard
    assert heard == [[bytes([number])] for number in (7, 8, 9)]


async def generate(plane, request_id: str, prompt: list[int], answer: int) -> tuple[str, list[int]]:
    """The engine that ran it, and all tokens in the end."""
    wire, journey = request(request_id, prompt, answer), Journey()
    with plane.client.start([wire], journey) as generation:
        async for _ in generation:
            pass
    (engine_id,) = journey.engines
    return engine_id, prompt + wire.output_token_ids


async def test_chat_stays_with_its_engine_through_the_whole_plane():
    async with open_plane(num_engines=4) as plane:
        tokens, home = list(range(500)), ""
        for turn in range(5):
            engine_id, tokens = await generate(plane, f"chat{turn}", tokens, answer=150)
            assert engine_id == (home or engine_id)
            home = engine_id
            (view,) = (view for view in plane.view() if view.engine_id == home)
            assert view.num_booked == 0
            state = plane.table._engines[home]
            assert state.index.overlap(plane.client.blocks_of([request("x", tokens)])[0]) >= 512
            for number in range(3):
                await generate(plane, f"other{turn}-{number}", [number, turn] * 200, answer=1)


async def test_without_prefix_caching_nothing_is_hashed():
    async with open_plane(num_engines=2) as plane:
        plane.client.prefix_caching = False
        home, _ = await generate(plane, "r", list(range(500)), answer=150)
        assert len(plane.table._engines[home].index) == 0
