"""The router with replicas that are only names, without Ray."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID

from deployments import load_table, routing
from deployments.app import build
from deployments.config import AppArgs
from deployments.engine_state import Traits
from deployments.load_table import LoadTable
from deployments.placement import Booking
from deployments.routing import EngineRouter
from engine.errors import EngineDead
from engine.outputs import EngineLoad


class CountingTable(LoadTable):
    tries = 0

    def book(self, *args: Any) -> str | None:
        self.tries += 1
        return super().book(*args)


@pytest.fixture
def table(monkeypatch):
    made = CountingTable()
    monkeypatch.setattr(load_table, "load_table", lambda: made)
    monkeypatch.setattr(routing, "RECHECK_S", 5.0)
    return made


def make_router(**limits: int) -> EngineRouter:
    router = EngineRouter(DeploymentID("m"), DeploymentHandleSource.REPLICA)
    router._replicas_list = [
        SimpleNamespace(replica_id=SimpleNamespace(unique_id=name), max_ongoing_requests=limit)
        for name, limit in limits.items()
    ]
    return router


async def place(
    router: EngineRouter, request_id: str, blocks=(), resumed=False, options="", **more: Any
) -> str:
    known = load_table.load_table()
    if not known.is_wanted(request_id):
        known.expect("m", request_id, 600)
    pending = SimpleNamespace(kwargs={}, args=[Booking(request_id, 600, blocks, resumed, options)])
    replica = await router._choose_replica_for_request(pending, **more)
    return replica.replica_id.unique_id


async def turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_burst_is_spread_evenly(table):
    router = make_router(a=64, b=64, c=64, d=64)
    chosen = await asyncio.gather(*(place(router, f"r{i}") for i in range(16)))
    assert Counter(chosen) == dict.fromkeys("abcd", 4)


async def test_requests_wait_for_room_in_order_of_arrival_and_without_polling(table):
    router, placed = make_router(a=2), []

    async def run(request_id: str) -> None:
        await place(router, request_id)
        placed.append(request_id)

    tasks = [asyncio.ensure_future(run(f"r{i}")) for i in range(100)]
    await turns()
    assert placed == ["r0", "r1"] and table.tries == 3
    for number in range(98):
        await asyncio.to_thread(table.release, f"r{number}")  # as the trunks' thread does
        await turns()
    assert placed == [f"r{i}" for i in range(100)]
    assert table.tries < 220
    await asyncio.gather(*tasks)


async def test_what_an_engine_s_loss_interrupted_goes_before_those_in_line(table):
    router, placed = make_router(a=1), []

    async def run(request_id: str, **more: Any) -> None:
        await place(router, request_id, **more)
        placed.append(request_id)

    tasks = [asyncio.ensure_future(run(f"r{i}")) for i in range(3)]
    await turns()
    tasks.append(asyncio.ensure_future(run("moved", resumed=True)))
    await turns()
    table.report("a", EngineLoad())  # it lives
    for _ in range(3):
        table.release(placed[-1])
        await turns()
    await asyncio.gather(*tasks)
    assert placed.index("moved") < placed.index("r2")


async def test_reports_cost_the_same_however_many_wait_for_room_after_a_loss(table):
    router, full = make_router(a=2, b=2), EngineLoad(num_running=1, num_waiting=1)
    table.set_members("m", "ab")
    for engine_id in "ab":
        table.report(engine_id, full)
    tasks = [asyncio.ensure_future(place(router, f"r{i}", resumed=True)) for i in range(100)]
    await turns()
    table.tries = 0
    for _ in range(10):
        table.report("a", full)
        await turns()
    assert table.tries == 10
    table.report("a", EngineLoad())
    table.report("b", full)  # it lives, so nobody waits for its answer
    await turns()
    assert [task.done() for task in tasks] == [True] * 2 + [False] * 98
    for task in tasks:
        task.cancel()


async def test_what_may_go_on_elsewhere_waits_for_no_other_options(table):
    router = make_router(old=2, new=2)
    table.set_members("m", ["old", "new"], {"old": Traits("A", 2), "new": Traits("B", 2)})
    table.report("old", EngineLoad(num_running=2))
    table.report("new", EngineLoad())
    head = asyncio.ensure_future(place(router, "head", resumed=True, options="A"))
    await turns()
    table.report("old", EngineLoad(num_running=2))  # it is full of what Serve lets end there
    behind = asyncio.ensure_future(place(router, "behind", resumed=True, options="B"))
    await turns()
    table.report("new", EngineLoad())
    assert await behind == "new"
    assert not head.done()
    table.report("old", EngineLoad())
    assert await head == "old"
    assert router._interrupted == {}


async def test_of_those_who_left_the_line_nothing_is_kept(table):
    router = make_router(a=1)
    await place(router, "r0")
    tasks = [asyncio.ensure_future(place(router, f"r{i}", resumed=i % 2)) for i in range(1, 9)]
    await turns()
    for task in tasks:
        task.cancel()
    await turns()
    assert (router._line, list(router._interrupted.values())) == ({}, [{}])


async def test_a_request_that_cannot_be_booked_fails_alone(table, monkeypatch):
    router = make_router(a=1)
    await place(router, "r0")
    bad, good = (asyncio.ensure_future(place(router, name)) for name in ("bad", "good"))
    await turns()
    book = table.book

    def fail(limits, booking, policy):
        if booking.request_id == "bad":
            raise ZeroDivisionError
        return book(limits, booking, policy)

    monkeypatch.setattr(table, "book", fail)
    table.release("r0")
    assert await good == "a"
    with pytest.raises(ZeroDivisionError):
        await bad


async def test_a_call_that_was_turned_away_follows_its_request(table, monkeypatch):
    monkeypatch.setattr(routing, "REFUSED_PAUSE_S", 1000)
    router = make_router(a=2, b=2)
    chosen = await place(router, "r")
    again = asyncio.ensure_future(place(router, "r", is_retry=True))
    await turns()
    assert not again.done() and table.engine_of("r") == chosen
    again.cancel()
    monkeypatch.setattr(routing, "REFUSED_PAUSE_S", 0.01)
    assert await place(router, "r", is_retry=True) == chosen


async def test_a_call_that_was_turned_away_by_a_replica_that_leaves_waits_for_the_end(
    table, monkeypatch
):
    monkeypatch.setattr(routing, "REFUSED_PAUSE_S", 0.01)
    router = make_router(a=2)
    await place(router, "r")
    again = asyncio.ensure_future(place(router, "r", is_retry=True))
    router._replicas_list = []
    await asyncio.sleep(0.05)
    assert not again.done()  # the engine may well finish the request
    table.release("r")
    with pytest.raises(EngineDead):
        await again


async def test_request_that_waits_sees_new_replicas_and_reports(table):
    router = make_router()
    waiting = asyncio.ensure_future(place(router, "r"))
    await turns()
    table.report("b", EngineLoad(num_running=1))
    router._replicas_list = make_router(b=1)._replicas_list
    table.set_members("m", ["b"])
    await turns()
    assert not waiting.done()
    table.report("b", EngineLoad())
    assert await waiting == "b"


async def test_request_that_leaves_the_line_holds_up_nobody(table):
    router = make_router(a=1)
    await place(router, "r")
    left, stays = (asyncio.ensure_future(place(router, name)) for name in ("left", "stays"))
    await turns()
    left.cancel()
    table.release("r")
    assert await stays == "a"


def router_options(**deployment: Any) -> dict[str, Any]:
    """What Serve gives the router of a deployment with these options."""
    args = AppArgs(**{f"deployment.{name}": value for name, value in deployment.items()})
    (engine,) = build(args)._bound_deployment.init_args[1].values()
    config = engine._bound_deployment._deployment_config.request_router_config
    return config.request_router_kwargs


@pytest.mark.parametrize(("margin", "expected"), [(0.25, "a"), (0.0, "b")])
async def test_deployment_sets_how_far_a_cache_attracts(table, margin, expected):
    router = make_router(a=64, b=64)
    router.initialize_state(**router_options(cache_affinity_margin=margin))
    table.report("a", EngineLoad(num_running=1), heard=[[b"1"]] * 18)
    table.report("b", EngineLoad())
    assert await place(router, "r", [b"1"]) == expected


async def test_deployment_sets_the_policy(table):
    router = make_router(a=64, b=64)
    router.initialize_state(**router_options(routing_policy="round_robin"))
    table.report("a", EngineLoad(num_running=50))
    chosen = [await place(router, f"r{i}") for i in range(4)]
    assert sorted(chosen[:2]) == ["a", "b"] and chosen == chosen[:2] * 2


async def test_what_is_booked_already_goes_there_past_the_line(table):
    router = make_router(a=1, b=2)
    router._tell_rules()
    table.set_members("m", "ab")
    booking = Booking("early", 600)
    table.expect("m", "early", 600)
    engine_id = table.book_at_once("m", booking)
    assert engine_id is not None and table.num_held("m") == 0
    await asyncio.gather(place(router, "r0"), place(router, "r1"))
    waiting = asyncio.ensure_future(place(router, "r2"))
    await turns()
    assert not waiting.done()
    assert await place(router, "early") == engine_id
    table.release("early")
    assert await waiting == engine_id


async def test_nobody_is_booked_at_once_before_those_who_wait(table):
    router = make_router(a=1)
    router._tell_rules()
    table.set_members("m", "a")
    for request_id in ("r0", "r1", "r2"):
        table.expect("m", request_id, 600)
    assert table.book_at_once("m", Booking("r2", 600)) is None  # two came before it
    assert [await place(router, "r0"), table.num_held("m")] == ["a", 2]
    table.release("r0")
    table.release("r1")
    assert table.book_at_once("m", Booking("r2", 600)) == "a"


async def test_an_engine_out_of_service_is_not_booked_at_once(table):
    make_router(a=1)._tell_rules()
    table.set_members("m", "b")
    table.expect("m", "r", 600)
    assert table.book_at_once("m", Booking("r", 600)) is None


async def test_without_rules_only_the_router_books(table):
    table.set_members("m", ["a"])
    table.expect("m", "r", 600)
    assert table.book_at_once("m", Booking("r", 600)) is None


async def test_rules_are_the_router_s(table):
    router = make_router(a=3)
    router.initialize_state("round_robin")
    assert table._rules["m"] == ({"a": 3}, router._policy)


async def test_calls_of_what_has_ended_stand_in_no_line(table):
    router = make_router(a=1)
    await place(router, "r0")
    waiting = asyncio.ensure_future(place(router, "r1"))
    await turns()
    ended = SimpleNamespace(kwargs={}, args=[Booking("ended", 600)])
    with pytest.raises(EngineDead):
        await router._choose_replica_for_request(ended)
    table.release("r1")  # while it stands in line
    table.release("r0")
    with pytest.raises(EngineDead):
        await waiting
