"""Mailboxes, the actor's trunk and the ingress's end of it, with fakes."""

from __future__ import annotations

import asyncio
import threading
from functools import partial

import pytest

from deployments import engine_actor
from deployments.engine_actor import EngineActor
from deployments.load_table import LoadTable
from deployments.mailbox import Mailbox
from deployments.placement import Booking
from deployments.subscriber import UNREAD_MESSAGES
from deployments.trunk import TrunkHub
from deployments.wire import (
    Submission,
    TrunkMessage,
    decode_report,
    decode_trunk_message,
    encode,
    merge_delta,
)
from engine.config import EngineConfig
from engine.errors import EngineDead
from engine.outputs import EngineLoad, TokenDelta, TokenLogprobs
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams
from tests.deployments.fake_core import FakeCore, expected_tokens
from tests.deployments.plane import open_plane
from tests.deployments.test_trunk_news import SteppedCore, be_quiet


def request(request_id: str, max_tokens: int = 5) -> EngineRequest:
    return EngineRequest(request_id, [1, 2, 3], SamplingParams(max_tokens=max_tokens, seed=0))


def test_merged_deltas_say_what_the_two_said():
    first = TokenDelta("r", [1], logprobs=[TokenLogprobs([1], [-0.5], 1)], num_cached_tokens=16)
    first.queued_s, first.prefill_s = 0.5, 0.25
    second = TokenDelta("r", [2], "stop", 7, logprobs=[TokenLogprobs([2], [-0.1], 1)])
    merge_delta(first, second)
    assert first == TokenDelta(
        "r",
        [1, 2],
        "stop",
        7,
        logprobs=[TokenLogprobs([1], [-0.5], 1), TokenLogprobs([2], [-0.1], 1)],
        num_cached_tokens=16,
        queued_s=0.5,
        prefill_s=0.25,
    )


def test_wire_round_trip():
    message = TrunkMessage([TokenDelta("r", [1], "length")], EngineLoad(num_running=3), ["r"])
    assert decode_trunk_message(encode(message)) == message


async def test_mailbox_merges_while_nobody_reads():
    mailbox = Mailbox()
    for token in range(1000):
        mailbox.add(TokenDelta("a", [token]))
        mailbox.add(TokenDelta("b", [token]))
    assert len(mailbox) == 2
    deltas = await mailbox.take()
    assert [d.token_ids for d in deltas] == [list(range(1000))] * 2


async def test_mailbox_fails_after_what_is_pending():
    mailbox = Mailbox()
    mailbox.add(TokenDelta("a", [1]))
    mailbox.fail(EngineDead("lost"))
    assert len(await mailbox.take()) == 1
    for _ in range(2):
        with pytest.raises(EngineDead):
            await mailbox.take()


async def submit(actor: EngineActor, subscriber: str, *requests: EngineRequest) -> None:
    await actor.submit(encode([Submission(subscriber, each) for each in requests]))


async def collect(trunk, until: int) -> dict[str, list[int]]:
    """Tokens by request, until so many requests have ended."""
    tokens: dict[str, list[int]] = {}
    ended = 0
    async for data in trunk:
        for delta in decode_trunk_message(data).deltas:
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
            ended += delta.finish_reason is not None
        if ended == until:
            return tokens
    return tokens


async def test_each_subscriber_gets_its_own_requests(actor):
    trunks = [actor.subscribe("x"), actor.subscribe("y")]
    await submit(actor, "x", request("x1"), request("x2", 9))
    await submit(actor, "y", request("y1", 4))
    mine, others = await asyncio.gather(collect(trunks[0], 2), collect(trunks[1], 1))
    assert mine == {i: expected_tokens([1, 2, 3], n) for i, n in (("x1", 5), ("x2", 9))}
    assert others == {"y1": expected_tokens([1, 2, 3], 4)}


async def test_trunk_that_nobody_reads_holds_one_delta_a_request(actor):
    trunk = actor.subscribe("x")
    await anext(trunk)
    await submit(actor, "x", request("r", 200))
    while actor._owners:
        await asyncio.sleep(0.01)
    messages = decode_trunk_message(await anext(trunk))
    assert [len(d.token_ids) for d in messages.deltas] == [200]


async def test_trunk_merges_steps_until_its_reader_acknowledges(monkeypatch):
    be_quiet(monkeypatch)
    began, end = threading.Semaphore(0), threading.Semaphore(0)
    actor = EngineActor(EngineConfig(), partial(SteppedCore, began=began, end=end))
    await actor.start()
    trunk = actor.subscribe("x")
    await anext(trunk)  # it is open
    await submit(actor, "x", request("r", 100))
    for _ in range(UNREAD_MESSAGES - 1):
        end.release()
        assert num_tokens(await anext(trunk)) == 1
    late = asyncio.ensure_future(anext(trunk))
    end.release(5)
    while actor._num_tokens["r"] < UNREAD_MESSAGES - 1 + 5:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    assert not late.done()
    await actor.acknowledge("x", UNREAD_MESSAGES)
    assert num_tokens(await late) == 5
    end.release()
    assert num_tokens(await anext(trunk)) == 1
    end.release(100)
    await actor.drain()


def num_tokens(data: bytes) -> int:
    (delta,) = decode_trunk_message(data).deltas
    return len(delta.token_ids)


async def test_reader_that_does_not_acknowledge_has_its_requests_aborted(actor, monkeypatch):
    trunk = actor.subscribe("x")
    await submit(actor, "x", request("r", 100_000))
    monkeypatch.setattr(engine_actor, "UNREAD_LIMIT_S", 0.0)
    async with asyncio.timeout(5):
        async for _ in trunk:
            pass
    assert not actor._owners and not actor._subscribers


async def test_reader_gives_way_to_a_newer_one_of_the_same_subscriber(actor):
    first = actor.subscribe("x")
    await submit(actor, "x", request("r", 100_000))
    for _ in range(UNREAD_MESSAGES):
        await anext(first)
    stuck = asyncio.ensure_future(anext(first, None))
    await asyncio.sleep(0)
    second = actor.subscribe("x")
    await anext(second)
    assert await asyncio.wait_for(stuck, 5) is None
    async with asyncio.timeout(10):
        while not decode_trunk_message(await anext(second)).deltas:
            pass  # a heartbeat


async def test_load_and_reflected_requests_ride_the_trunk(actor):
    trunk = actor.subscribe("x")
    await submit(actor, "x", request("r", 100_000))
    async with asyncio.timeout(5):
        while "r" not in (message := decode_trunk_message(await anext(trunk))).reflected:
            await actor.acknowledge("x", 1)
    assert message.load.num_running == 1


async def test_reader_that_leaves_has_its_requests_aborted(actor):
    watch = actor.watch()
    trunk = actor.subscribe("x")
    await submit(actor, "x", request("r", 100_000))
    await anext(trunk)
    await trunk.aclose()
    async with asyncio.timeout(5):  # long before `UNREAD_LIMIT_S`
        while not (ended := decode_report(await anext(watch)).ended):
            pass  # a heartbeat
    assert [(notice.request_id, notice.reason) for notice in ended] == [("r", "abort")]
    while actor._loop._core.has_work:
        await asyncio.sleep(0.01)


async def test_submission_of_a_subscriber_that_never_comes_is_aborted(actor, monkeypatch):
    monkeypatch.setattr(engine_actor, "UNREAD_LIMIT_S", 0.0)
    await submit(actor, "ghost", request("r", 100_000))
    while actor._owners:
        await asyncio.sleep(0.05)


async def test_abort_that_overtakes_its_request_ends_it(actor):
    watch = actor.watch()
    await actor.abort(["r"])
    await submit(actor, "x", request("r", 100_000), request("s", 3))
    assert await collect(actor.subscribe("x"), 1) == {"s": [1, 2, 3]}
    assert not actor._owners and not actor._loop._core.has_work
    ended = [notice.reason async for data in upto(watch, 2) for notice in data]
    assert sorted(ended) == ["abort", "length"]


async def upto(watch, count: int):
    """Lists of ends, until so many have come."""
    async for data in watch:
        ended = decode_report(data).ended
        yield ended
        count -= len(ended)
        if count <= 0:
            return


async def test_ends_that_follow_a_report_wait_for_the_next(actor, monkeypatch):
    sleep, over = asyncio.sleep, asyncio.Event()

    async def sleep_until_over(seconds: float) -> None:
        await (over.wait() if seconds == 1000 else sleep(seconds))

    monkeypatch.setattr(engine_actor, "REPORT_INTERVAL_S", 1000)
    monkeypatch.setattr(asyncio, "sleep", sleep_until_over)
    over.set()
    watch = actor.watch()
    await submit(actor, "x", request("a", 1))
    while not (ended := decode_report(await anext(watch)).ended):
        pass  # a heartbeat
    assert [notice.request_id for notice in ended] == ["a"]
    over.clear()
    report = asyncio.ensure_future(anext(watch))
    for request_id in ("b", "c"):
        await submit(actor, "x", request(request_id, 1))
        while actor._owners:
            await asyncio.sleep(0.001)
    over.set()
    assert [notice.request_id for notice in decode_report(await report).ended] == ["b", "c"]


async def test_early_aborts_are_forgotten(actor, monkeypatch):
    monkeypatch.setattr(engine_actor, "EARLY_ABORTS", 3)
    await actor.abort([f"r{i}" for i in range(5)])
    assert list(actor._early_aborts) == ["r2", "r3", "r4"]
    monkeypatch.setattr(engine_actor, "EARLY_ABORTS_S", -1.0)
    await actor.abort(["s"])
    assert not actor._early_aborts


class Noting:
    """A receiver that notes what it is told, and fails at some of it."""

    deployment = "m"

    def __init__(self, fails_at: str = "") -> None:
        self.told: list[str] = []
        self._fails_at = fails_at

    def add(self, delta: TokenDelta, engine_id: str) -> None:
        self._note("add")

    def lose(self) -> None:
        self._note("lose")

    def make_way(self) -> bool:
        self._note("make_way")
        return True

    def strand(self) -> None:
        self._note("strand")

    def fail(self, error: Exception) -> None:
        self.told.append(str(error))

    def _note(self, what: str) -> None:
        self.told.append(what)
        if what == self._fails_at:
            raise RuntimeError("a defect")


@pytest.mark.parametrize("what", ["add", "make_way", "lose", "strand"])
async def test_a_receiver_that_fails_stops_no_other_and_hears_of_it(what, caplog):
    table = LoadTable()
    table.set_members("m", ["e"])
    hub = TrunkHub("x", table)
    receivers = {"a": Noting(), "b": Noting(what), "c": Noting()}
    for name, receiver in receivers.items():
        hub.register(name, receiver)
        table.book({"e": 9}, Booking(name, 1))
    hub._deliver("e", TrunkMessage([TokenDelta(name, [1]) for name in receivers], EngineLoad()))
    assert [hub.make_way(name) for name in receivers] == [True, what != "make_way", True]
    hub._lose("e", "cut")
    everything = ["add", "make_way", "lose", "strand"]
    assert receivers["a"].told == receivers["c"].told == everything
    everything.insert(everything.index(what) + 1, "a defect")
    assert receivers["b"].told == everything
    assert "request b is given up" in caplog.text


async def test_drain_ends_the_trunks(actor):
    trunk = actor.subscribe("x")
    await anext(trunk)
    await actor.drain()
    async with asyncio.timeout(5):
        async for _ in trunk:
            pass


async def test_death_is_told_on_trunk_and_watch():
    actor = EngineActor(EngineConfig(), partial(FakeCore, die_at_token=2))
    await actor.start()
    trunk, watch = actor.subscribe("x"), actor.watch()
    await submit(actor, "x", request("r"))
    deltas = [d async for data in trunk for d in decode_trunk_message(data).deltas]
    assert deltas[-1].finish_reason == "error" and deltas[-1].error
    reports = [decode_report(data) async for data in watch]
    assert "told to die" in (reports[-1].dead or "")
    with pytest.raises(EngineDead):
        await submit(actor, "x", request("s"))


async def test_an_engine_that_has_ended_asks_for_no_requests(actor):
    """It would get those that it has just lost."""
    trunk = actor.subscribe("x")
    assert not decode_trunk_message(await anext(trunk)).load.overdue
    last = asyncio.ensure_future(anext(trunk))
    await asyncio.sleep(0)  # it waits for news
    actor._guard.end(RuntimeError("told to die"))
    assert decode_trunk_message(await last).load.overdue


async def test_tokens_so_far_are_kept_for_a_resubmission():
    async with open_plane(step_s=0.005) as plane:
        wire = request("r", 20)
        with plane.client.start([wire]) as generation:
            async for _ in generation:
                pass
        assert wire.output_token_ids == expected_tokens([1, 2, 3], 20)
