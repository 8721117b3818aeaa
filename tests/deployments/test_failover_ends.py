"""Requests whose engines are lost: when they wait, when they are given up, and which calls end."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.exceptions import BackPressureError

from deployments import dispatch, failover
from deployments.failover import FailoverLimits
from deployments.placement import Booking
from engine.errors import EngineDead
from engine.outputs import TokenDelta
from tests.deployments.fake_core import expected_tokens
from tests.deployments.flights import PROMPT, request, take
from tests.deployments.plane import DEPLOYMENT, LocalCall, open_plane


async def test_it_waits_for_a_new_engine():
    async with open_plane(num_engines=1, step_s=0.005) as plane:
        tokens: dict[str, list[int]] = {}
        with plane.client.start([request("r")]) as generation:
            await take(generation, tokens, 10)
            await plane.cut("e0")  # it is read anew half a second later
            assert not plane.hub.connected(DEPLOYMENT)
            await take(generation, tokens, 60)
        assert tokens["r"] == expected_tokens(PROMPT, 60)


async def test_without_an_engine_it_ends_with_an_error_in_time():
    async with open_plane(num_engines=1, step_s=0.005) as plane:
        with plane.client.start([request("r", 4000), request("s", 4000)]) as generation:
            await anext(generation)
            await plane.cut("e0", for_good=True)
            with pytest.raises(EngineDead, match="no engine could go on"):
                async with asyncio.timeout(5):
                    async for _ in generation:
                        pass
        assert plane.client.num_running == 0


async def test_a_request_in_line_does_not_wait_for_ever_either():
    async with open_plane(num_engines=1) as plane:
        plane.handle.set_limit(0)  # it takes nothing
        with plane.client.start([request("r")]) as generation:
            await asyncio.sleep(0.05)
            await plane.cut("e0", for_good=True)
            with pytest.raises(EngineDead):
                async with asyncio.timeout(5):
                    await anext(generation)


async def test_what_breaks_every_engine_is_given_up(monkeypatch):
    monkeypatch.setattr(failover, "LATE_TOKENS_S", 60)  # no call outlives its try
    async with open_plane(num_engines=4, step_s=0.001, die_at_token=5) as plane:
        with plane.client.start([request("r")]) as generation:
            deltas = [delta async for each in generation for delta in each]
    assert [d.token_ids for d in deltas[:-1] if d.token_ids]
    assert deltas[-1].finish_reason == "error"
    assert plane.client.num_running == 0


async def test_a_request_that_cannot_go_on_is_told_so_and_stops_no_other(most):
    def fail(_: Any) -> bytes:
        raise TypeError("it cannot be encoded any more")

    most[""] = 10
    async with open_plane(num_engines=1, step_s=0.005) as plane:
        tokens: dict[str, list[int]] = {}
        bad, good = (plane.client.start([request(name)]) for name in ("bad", "good"))
        with bad, good:
            await take(good, tokens, 10)
            bad._flights["bad"]._encode = fail
            await plane.cut("e0")
            most.clear()
            with pytest.raises(TypeError, match="any more"):
                async with asyncio.timeout(5):
                    await take(bad, {"": []}, 60)
            await take(good, tokens, 60)
        assert tokens == {"good": expected_tokens(PROMPT, 60)}
        assert not plane.hub._receivers


@pytest.mark.parametrize("stranded_first", [False, True])
async def test_what_waits_at_an_engine_that_is_to_stop_is_not_stranded(stranded_first, most):
    """Whoever is in service may be lost meanwhile: this engine is not."""
    most["r"] = 0
    async with open_plane(num_engines=2, step_s=0.005) as plane:
        plane.client.failover = FailoverLimits(timeout_s=0.2)
        plane.table.set_members(DEPLOYMENT, ["e0"])
        with plane.client.start([request("r")]) as generation:
            if stranded_first:
                generation._flights["r"].strand()
            await plane.until(lambda: plane.table.engine_of("r") == "e0")
            plane.table.set_members(DEPLOYMENT, ["e1"])
            await plane.cut("e1", for_good=True)
            plane.table.set_members(DEPLOYMENT, [])
            await asyncio.sleep(0.4)
            most.clear()
            tokens: dict[str, list[int]] = {}
            await take(generation, tokens, 60)
        assert tokens["r"] == expected_tokens(PROMPT, 60)


async def test_the_end_of_a_client_ends_every_try():
    async with open_plane(num_engines=2, step_s=0.005) as plane:
        with plane.client.start([request("r", 100_000)]) as generation:
            await anext(generation)
            await plane.cut(plane.table.engine_of("r"))
            await plane.until(lambda: plane.table.engine_of("r~2") is not None)
        await plane.idle()
        assert all(view.num_booked == 0 for view in plane.view())


async def test_few_tokens_are_no_success():
    async with open_plane(num_engines=1, step_s=2) as plane:  # none of its own come meanwhile
        with plane.client.start([request("r", 1000)]) as generation:
            flight = generation._flights["r"]
            for length in (1, 1, 1):
                flight.add(TokenDelta("r", [5] * length), "e0")
                flight._fall(TokenDelta("r", [], finish_reason="error", error="broken"))
                if flight._next_try is not None:
                    flight._next_try.cancel()
                    flight._try_again()
            assert flight._over


async def test_calls_that_fail_in_odd_ways_hang_nobody(monkeypatch, most):
    def cancel(call: LocalCall) -> None:
        call.task.cancel()
        raise BackPressureError(num_queued_requests=1, max_queued_requests=1)

    monkeypatch.setattr(LocalCall, "cancel", cancel)
    most["r"] = 10
    async with open_plane(num_engines=2, step_s=0.005) as plane:
        plane.handle.set_limit(0)
        plane.handle.failure = BackPressureError(num_queued_requests=1, max_queued_requests=1)
        with plane.client.start([request("s")]) as other, pytest.raises(BackPressureError):
            async with asyncio.timeout(5):
                await anext(other)
        plane.handle.failure = None
        plane.handle.set_limit(1000)
        tokens: dict[str, list[int]] = {}
        with plane.client.start([request("r")]) as generation:
            await take(generation, tokens, 10)
            await plane.cut(plane.table.engine_of("r"))
            most.clear()
            await take(generation, tokens, 60)
        assert tokens["r"] == expected_tokens(PROMPT, 60)


async def test_a_long_wait_in_line_is_no_loss():
    async with open_plane(num_engines=1, step_s=0.005) as plane:
        plane.client.failover = FailoverLimits(timeout_s=1000)
        plane.handle.set_limit(0)  # it takes nothing for a while
        tokens: dict[str, list[int]] = {}
        with plane.client.start([request("r")]) as generation:
            await plane.cut("e0")
            await plane.until(lambda: plane.hub.connected(DEPLOYMENT))
            flight = generation._flights["r"]
            assert flight._expiry is not None
            flight._expire()  # it stands in line again
            plane.handle.set_limit(1000)
            await take(generation, tokens, 60)
        assert tokens["r"] == expected_tokens(PROMPT, 60)


async def test_a_request_that_begins_without_an_engine_has_a_limit():
    async with open_plane(num_engines=1) as plane:
        await plane.cut("e0", for_good=True)
        with plane.client.start([request("r")]) as generation, pytest.raises(EngineDead):
            async with asyncio.timeout(5):
                await anext(generation)


async def test_a_call_is_cancelled_only_where_no_engine_can_be_told(monkeypatch):
    cancelled: list[LocalCall] = []

    def cancel(call: LocalCall) -> None:
        cancelled.append(call)

    monkeypatch.setattr(LocalCall, "cancel", cancel)
    async with open_plane(num_engines=1, step_s=0.005) as plane:
        tokens: dict[str, list[int]] = {}
        with plane.client.start([request("r", 100_000)]) as generation:
            await take(generation, tokens, 5)
        await plane.idle()
        assert not cancelled
        plane.handle.set_limit(0)
        with plane.client.start([request("s")]):
            await asyncio.sleep(0.02)  # it stands in line
        assert len(cancelled) == 1


async def test_an_engine_that_runs_for_nobody_is_told_again(monkeypatch):
    monkeypatch.setattr(dispatch, "ABORT_LIMIT_S", 0.05)
    async with open_plane(num_engines=1, step_s=0.005) as plane:
        link, tokens = plane.links["e0"], dict[str, list[int]]()
        abort = link.abort
        monkeypatch.setattr(link, "abort", lambda request_ids: None)  # the call is lost
        with plane.client.start([request("r", 100_000)]) as generation:
            await take(generation, tokens, 5)
        await asyncio.sleep(0.1)
        assert plane.view()[0].load.num_running == 1
        monkeypatch.setattr(link, "abort", abort)
        await plane.idle()


async def test_serve_sends_nothing_on_for_a_client_that_has_left():
    async with open_plane(num_engines=2, step_s=0.005) as plane:
        tokens: dict[str, list[int]] = {}
        with plane.client.start([request("r", 100_000)]) as generation:
            await take(generation, tokens, 5)
        with pytest.raises(EngineDead):
            plane.table.book(dict.fromkeys(plane.actors, 1000), Booking("r", 5))


async def test_a_full_queue_of_calls_does_not_end_what_an_engine_runs(most):
    most["r"] = 5
    async with open_plane(num_engines=1, step_s=0.005) as plane:
        calls, tokens = [], dict[str, list[int]]()
        remote = plane.handle.generate.remote

        def full_at_first(*args: Any) -> LocalCall:
            full = BackPressureError(num_queued_requests=1, max_queued_requests=1)
            plane.handle.failure = full if len(calls) < 2 else None
            calls.append(remote(*args))
            return calls[-1]

        plane.handle.generate = SimpleNamespace(remote=full_at_first)
        with plane.client.start([request("r", 100)]) as generation:
            await plane.until(lambda: len(calls) == 3)
            most.clear()
            await take(generation, tokens, 100)
        assert tokens["r"] == expected_tokens(PROMPT, 100)
        assert len(calls) == 3
