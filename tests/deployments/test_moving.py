"""Requests of an engine that is to stop: they go on elsewhere at once, or end where they are."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import pytest

from deployments import moving
from deployments.engine_state import LITTLE_AHEAD, EngineState, Traits
from deployments.journey import Journey
from deployments.load_table import LoadTable
from deployments.moving import REFUSALS, Mover
from deployments.placement import Booking
from engine.outputs import EngineLoad
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams
from tests.deployments.fake_core import expected_tokens
from tests.deployments.plane import DEPLOYMENT, Plane, open_plane

PROMPT = [5, 6, 7, 8, 9]
SMALL, OTHER = Traits("these", 16), Traits("those", 16)
IDLE = EngineLoad(free_blocks=90, total_blocks=100, block_size=16)


def request(request_id: str, max_tokens: int = 200) -> EngineRequest:
    return EngineRequest(request_id, PROMPT, SamplingParams(max_tokens=max_tokens, seed=1))


def set_members(plane: Plane, **traits: Traits) -> None:
    """Have these engines in service, as Serve tells a router."""
    plane.handle._actors = {name: plane.actors[name] for name in traits}
    plane.table.set_members(DEPLOYMENT, traits, traits)


async def collect(generation) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    async for deltas in generation:
        for delta in deltas:
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
    return tokens


async def running(plane: Plane, engine_id: str, count: int) -> None:
    def are_there() -> bool:
        loads = {view.engine_id: view.load.num_running for view in plane.view()}
        return loads.get(engine_id) == count

    await plane.until(are_there)


async def test_streams_of_an_engine_that_stops_go_on_elsewhere_and_free_it(most):
    most[""] = 8
    async with open_plane(num_engines=2, step_s=0.01) as plane:
        mover, journey = Mover(plane.hub, plane.table), Journey()
        set_members(plane, e0=SMALL)
        wires = [request(f"r{i}") for i in range(4)]
        with plane.client.start(wires, journey) as generation:
            answers = asyncio.ensure_future(collect(generation))
            await plane.until(lambda: all(len(wire.output_token_ids) > 5 for wire in wires))
            set_members(plane, e1=SMALL)
            await plane.until(lambda: plane.actors["e0"]._load.num_running == 0)
            assert all(len(wire.output_token_ids) < 200 for wire in wires)
            most.clear()
            assert await answers == {f"r{i}": expected_tokens(PROMPT, 200) for i in range(4)}
        assert journey.engines == ["e0", "e1"] and not journey.moved_at  # nothing was lost
        use = plane.actors["e1"]._meter.read(time.monotonic())
        assert use.arriving_requests_s == use.arriving_tokens_s == 0  # nor is any of it new
        assert mover._task is not None
        await mover._task
        assert not plane.table.left_behind()


@pytest.mark.parametrize(
    "others", [{}, {"e1": OTHER}, {"e1": Traits("these", 0)}], ids=["none", "others", "full"]
)
async def test_they_end_where_they_are_if_nobody_can_go_on(others, most):
    most["r"] = 5
    async with open_plane(num_engines=2, step_s=0.005) as plane:
        mover, journey = Mover(plane.hub, plane.table), Journey()
        set_members(plane, e0=SMALL)
        with plane.client.start([request("r", 60)], journey) as generation:
            answers = asyncio.ensure_future(collect(generation))
            await running(plane, "e0", 1)
            set_members(plane, **others)
            most.clear()
            assert await answers == {"r": expected_tokens(PROMPT, 60)}
        assert journey.engines == ["e0"]
        assert mover._task is not None


@pytest.mark.parametrize("lost", [False, True], ids=["stops", "is lost"])
async def test_what_moves_before_its_first_token_is_not_new_either(lost, most):
    most["r"] = 0
    async with open_plane(num_engines=2, step_s=0.01) as plane:
        set_members(plane, e0=SMALL)
        with plane.client.start([request("r", 20)]) as generation:
            answers = asyncio.ensure_future(collect(generation))
            await running(plane, "e0", 1)
            mover = None if lost else Mover(plane.hub, plane.table)
            set_members(plane, e1=SMALL)
            if lost:
                await plane.cut("e0", for_good=True)
            await plane.until(lambda: plane.table.engine_of("r~2") == "e1")
            most.clear()
            assert await answers == {"r": expected_tokens(PROMPT, 20)}
        uses = [plane.actors[name]._meter.read(time.monotonic()) for name in ("e0", "e1")]
        assert [use.arriving_tokens_s > 0 for use in uses] == [True, False]
        assert [use.arriving_requests_s > 0 for use in uses] == [True, False]
        assert lost or mover._task is not None


async def test_they_move_as_soon_as_there_is_space(most):
    most |= {"short": 5, "long": 5}
    async with open_plane(num_engines=2, step_s=0.01) as plane:
        mover, journey = Mover(plane.hub, plane.table), Journey()
        set_members(plane, e0=Traits("these", 1), e1=Traits("these", 1))
        first = plane.client.start([request("short", 60)])
        wire = request("long", 250)
        with first, plane.client.start([wire], journey) as generation:
            answers = asyncio.ensure_future(collect(generation))
            await running(plane, "e0", 1)
            await running(plane, "e1", 1)
            own = plane.table.engine_of("long")
            other = "e1" if own == "e0" else "e0"
            set_members(plane, **{other: Traits("these", 1)})
            del most["short"]
            await collect(first)
            assert journey.engines == [own]
            await plane.until(lambda: plane.table.engine_of("long~2") is not None)
            most.clear()
            assert await answers == {"long": expected_tokens(PROMPT, 250)}
        assert journey.engines == [own, other]
        assert mover._task is not None


async def test_a_look_asks_for_a_few_and_in_time_for_all(monkeypatch):
    monkeypatch.setattr(moving, "LOOK_S", 0.0)
    table, looks = LoadTable(), []
    table.set_members("m", ["a"])
    for number in range(50):
        table.book({"a": 100}, Booking(f"r{number}", 100))

    def make_way(request_id: str) -> bool:
        looks[-1] += 1
        if request_id == "r49":
            for number in range(50):
                table.release(f"r{number}")
        return request_id == "r49"

    left_behind = table.left_behind
    monkeypatch.setattr(table, "left_behind", lambda: (looks.append(0), left_behind())[1])
    mover = Mover(SimpleNamespace(make_way=make_way), table)
    table.set_members("m", [])
    async with asyncio.timeout(10):
        while table.left_behind():
            await asyncio.sleep(0)
    assert 1 <= max(looks) <= REFUSALS + 1
    assert mover._task is not None
    await mover._task


def make_table(**loads: EngineLoad) -> LoadTable:
    """A request `r` runs on engine a, which is to stop; the others are in service."""
    table = LoadTable()
    traits = dict.fromkeys(["a", *loads], SMALL)
    table.set_members("m", ["a"], traits)
    table.book({"a": 100}, Booking("r", 100))
    table.set_members("m", loads, traits)
    for engine_id, load in loads.items():
        table.report(engine_id, load)
    return table


def test_a_lost_engine_leaves_nobody_behind():
    table = make_table(b=IDLE)
    assert table.left_behind() == ["r"]
    table.mark_down("a")
    assert table.left_behind() == []


def test_requests_that_move_are_counted_before_they_arrive():
    table = make_table(b=EngineLoad(num_running=14, free_blocks=90, total_blocks=100))
    assert table.has_space("m", "r", 100)
    table.expect("m", "one", 100)
    assert table.has_space("m", "r", 100)
    table.expect("m", "two", 100)
    assert not table.has_space("m", "r", 100)


@pytest.mark.parametrize(
    "load",
    [
        EngineLoad(num_running=16, free_blocks=90, total_blocks=100, block_size=16),
        EngineLoad(num_running=1, free_blocks=6, total_blocks=100, block_size=16),
        EngineLoad(waiting_tokens=LITTLE_AHEAD + 1, free_blocks=900, total_blocks=1000),
        EngineLoad(overdue=True, free_blocks=90, total_blocks=100),
    ],
    ids=["rows", "blocks", "prefill", "overdue"],
)
def test_space_is_rows_blocks_and_a_short_queue(load):
    assert not make_table(b=load).has_space("m", "r", 100)
    assert make_table(b=load, c=IDLE).has_space("m", "r", 100)


def test_an_engine_that_has_not_told_its_load_has_no_space():
    assert not EngineState(traits=SMALL).has_space(10, 0, 0)


def test_what_has_begun_goes_on_with_the_same_options_while_there_are_any():
    traits = {"same": SMALL, "other": OTHER}
    table, booking = LoadTable(), Booking("r", 100, resumed=True, options=SMALL.options)
    table.set_members("m", traits, traits)
    table.report("same", EngineLoad(num_running=2))
    table.report("other", EngineLoad())
    assert table.book({"same": 2, "other": 9}, booking) is None
    assert table.book({"same": 9, "other": 9}, booking) == "same"
    table.mark_down("same")
    assert table.book({"same": 9, "other": 9}, booking) == "other"


async def test_after_a_loss_it_goes_on_with_the_same_options(most):
    most["r"] = 5
    async with open_plane(num_engines=3, step_s=0.01) as plane:
        set_members(plane, e0=SMALL)
        journey = Journey()
        with plane.client.start([request("r", 100)], journey) as generation:
            answers = asyncio.ensure_future(collect(generation))
            await running(plane, "e0", 1)
            set_members(plane, e0=SMALL, e1=OTHER, e2=SMALL)
            for number in range(4):  # e1 is the idlest
                plane.table.expect(DEPLOYMENT, f"new{number}", 100)
                plane.table.book({"e2": 9}, Booking(f"new{number}", 100))
            await plane.cut("e0", for_good=True)
            most.clear()
            assert await answers == {"r": expected_tokens(PROMPT, 100)}
        assert journey.engines == ["e0", "e2"]


def test_what_has_begun_goes_where_a_row_is_free():
    table = LoadTable()
    traits = {"a": Traits("these", 2), "b": Traits("these", 2)}
    table.set_members("m", traits, traits)
    table.report("a", EngineLoad(num_running=2))
    table.report("b", EngineLoad(num_running=1, waiting_tokens=9000))
    assert table.book({"a": 4, "b": 4}, Booking("new", 100)) == "a"
    table.report("a", EngineLoad(num_running=2), ["new"])
    assert table.book({"a": 4, "b": 4}, Booking("moved", 100, resumed=True)) == "b"
