"""Requests whose engines are lost: what goes on elsewhere, and what it says."""

from __future__ import annotations

import asyncio
import time
from contextvars import ContextVar

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError, RequestCancelledError

from deployments import engine_actor, trunk, watchdog
from deployments.failover import FailoverLimits, _is_loss
from engine.errors import EngineDead
from engine.outputs import TokenDelta, TokenLogprobs
from tests.deployments.fake_core import expected_tokens
from tests.deployments.flights import PROMPT, request, take
from tests.deployments.plane import DEPLOYMENT, LocalCall, open_plane


async def test_a_request_goes_on_elsewhere_and_no_token_is_lost_or_repeated(most):
    most["r"] = 10
    async with open_plane(num_engines=2, step_s=0.005) as plane:
        tokens: dict[str, list[int]] = {}
        with plane.client.start([request("r")]) as generation:
            await take(generation, tokens, 10)
            first = plane.table.engine_of("r")
            await plane.cut(first, for_good=True)
            await plane.until(lambda: plane.table.engine_of("r~2") is not None)
            assert plane.table.engine_of("r~2") != first
            plane.links[first].broken.clear()
            most.clear()
            await take(generation, tokens, 60)
        assert tokens == {"r": expected_tokens(PROMPT, 60)}
        await plane.idle()  # the first engine, which was only cut off, has been told to stop
        assert plane.client.num_running == 0 and not plane.hub._receivers


async def test_again_and_again_and_with_what_is_not_yet_read(monkeypatch, most):
    monkeypatch.setattr(trunk, "RECONNECT_DELAY_S", 0.05)
    async with open_plane(num_engines=2, step_s=0.005) as plane:
        wire = request("r", 600)
        with plane.client.start([wire]) as generation:
            for number in range(1, 8):
                most["r"] = 40 * number + 10
                name = "r" if number == 1 else f"r~{number}"
                await plane.until(lambda: len(plane.hub.connected(DEPLOYMENT)) == 2)
                await plane.until(lambda number=number: len(wire.output_token_ids) > 40 * number)
                await plane.cut(plane.table.engine_of(name))
            most.clear()
            tokens: dict[str, list[int]] = {}
            await take(generation, tokens, 600)
        assert tokens["r"] == expected_tokens(PROMPT, 600)


async def test_only_those_of_the_lost_engine_move(most):
    most[""] = 10
    async with open_plane(num_engines=2, step_s=0.005) as plane:
        tokens: dict[str, list[int]] = {}
        with plane.client.start([request(f"r{i}") for i in range(4)]) as generation:
            await take(generation, tokens, 10)
            lost = {f"r{i}" for i in range(4) if plane.table.engine_of(f"r{i}") == "e0"}
            assert len(lost) == 2
            await plane.cut("e0")
            moved = {
                name for name in (f"r{i}" for i in range(4)) if name not in plane.hub._receivers
            }
            assert moved == lost
            most.clear()
            await take(generation, tokens, 61)  # until all have ended
        assert tokens == {f"r{i}": expected_tokens(PROMPT, 60) for i in range(4)}


async def test_a_text_is_the_same_as_without_the_loss(most):
    body = {"model": "m", "prompt": "one two three", "max_tokens": 60, "stop": ["never"]}
    async with open_plane(num_engines=2, step_s=0.005) as plane:
        whole = (await plane.http.post("/v1/completions", json=body)).json()
        most[""] = 20
        answer = asyncio.ensure_future(plane.http.post("/v1/completions", json=body))
        await plane.until(lambda: sum(v.load.generated_tokens for v in plane.view()) == 60 + 20)
        await plane.cut(next(v.engine_id for v in plane.view() if v.load.num_running))
        most.clear()
        parted = (await answer).json()
    assert parted["choices"] == whole["choices"] and parted["usage"] == whole["usage"]


async def test_a_silent_engine_is_lost(monkeypatch, most):
    monkeypatch.setattr(trunk, "SILENCE_LIMIT_S", 1.5)
    most["r"] = 5
    async with open_plane(num_engines=2, step_s=0.02) as plane:
        tokens: dict[str, list[int]] = {}
        with plane.client.start([request("r", 100)]) as generation:
            await take(generation, tokens, 5)
            engine = plane.actors[plane.table.engine_of("r")]
            engine._ticker.cancel()
            engine._loop._on_step = lambda deltas, load: None  # it hangs
            most.clear()
            await take(generation, tokens, 100)
        assert tokens["r"] == expected_tokens(PROMPT, 100)


async def test_an_idle_engine_says_at_once_that_it_lives(monkeypatch, most):
    monkeypatch.setattr(engine_actor, "HEARTBEAT_S", 1000.0)
    most["r"] = 10
    async with open_plane(num_engines=2, step_s=0.005) as plane:
        tokens: dict[str, list[int]] = {}
        with plane.client.start([request("r")]) as generation:
            await take(generation, tokens, 10)
            await plane.cut(plane.table.engine_of("r"), for_good=True)
            most.clear()
            async with asyncio.timeout(5):
                await take(generation, tokens, 60)
        assert tokens["r"] == expected_tokens(PROMPT, 60)


async def test_an_ingress_that_stood_still_takes_no_engine_for_lost(monkeypatch):
    monkeypatch.setattr(trunk, "SILENCE_LIMIT_S", 0.3)
    monkeypatch.setattr(watchdog, "LOOK_S", 0.02)
    monkeypatch.setattr(engine_actor, "HEARTBEAT_S", 0.05)
    lost: list[str] = []
    async with open_plane(num_engines=2, step_s=0.005) as plane:
        monkeypatch.setattr(plane.hub, "_lose", lambda engine_id, reason: lost.append(reason))
        for _ in range(3):
            time.sleep(0.6)
            await asyncio.sleep(0.1)
        assert not lost


async def test_backpressure_is_an_answer_for_new_requests_only(most):
    most["r"] = 10
    async with open_plane(num_engines=2, step_s=0.005) as plane:
        plane.client.failover = FailoverLimits(timeout_s=1000)
        full = BackPressureError(num_queued_requests=1, max_queued_requests=1)
        tokens: dict[str, list[int]] = {}
        with plane.client.start([request("r")]) as generation:
            await take(generation, tokens, 10)
            plane.handle.failure = full
            await plane.cut(plane.table.engine_of("r"))
            most.clear()
            await plane.until(lambda: generation._flights["r"]._num_tries > 2)
            plane.handle.set_limit(0)
            with plane.client.start([request("s")]) as other, pytest.raises(BackPressureError):
                await anext(other)
            plane.handle.set_limit(1000)
            plane.handle.failure = None
            await take(generation, tokens, 60)
        assert tokens["r"] == expected_tokens(PROMPT, 60)


async def test_prompt_logprobs_come_once():
    async with open_plane(num_engines=1, step_s=0.005) as plane:
        entry = TokenLogprobs(token_ids=[1], logprobs=[0.0], rank=1)
        with plane.client.start([request("r", prompt_logprobs=0)]) as generation:
            flight = generation._flights["r"]
            flight.add(TokenDelta("r", [], prompt_logprobs=[entry] * 3), "e0")
            flight._plan_try(60.0)
            assert flight._rest().params.prompt_logprobs == 0  # no token has come: all again
            delta = TokenDelta("r~2", [], prompt_logprobs=[entry] * 2)
            flight.add(delta, "e0")
            assert delta.prompt_logprobs == []
            delta = TokenDelta("r~2", [7], prompt_logprobs=[entry] * 2)
            flight.add(delta, "e0")
            assert delta.prompt_logprobs == [entry]
            flight.add(TokenDelta("r~2", [7]), "e0")
            assert flight._rest().params.prompt_logprobs is None


async def test_tokens_before_a_failed_step_count_and_its_engine_is_avoided():
    async with open_plane(num_engines=2, step_s=0.05) as plane:
        with plane.client.start([request("r")]) as generation:
            flight = generation._flights["r"]
            await plane.until(lambda: plane.table.engine_of("r") is not None)
            first = plane.table.engine_of("r")
            flight.add(TokenDelta("r", PROMPT[:2], finish_reason="error", error="no"), first)
            assert flight.request.output_token_ids == PROMPT[:2]
            assert plane.table._engines[first].down
            await plane.until(lambda: plane.table.engine_of("r~2") not in (None, first))
            tokens: dict[str, list[int]] = {}
            await take(generation, tokens, 60)
        assert tokens["r"] == expected_tokens(PROMPT, 60)


async def test_its_own_cancellation_is_no_second_loss(monkeypatch, most):
    async def settle(call: LocalCall) -> str:
        try:
            return await asyncio.shield(call.task)
        except asyncio.CancelledError:
            for _ in range(3):
                await asyncio.sleep(0)
            raise RequestCancelledError from None

    monkeypatch.setattr(LocalCall, "__await__", lambda call: settle(call).__await__())
    most["r"] = 10
    async with open_plane(num_engines=3, step_s=0.005) as plane:
        tokens: dict[str, list[int]] = {}
        with plane.client.start([request("r")]) as generation:
            await take(generation, tokens, 10)
            await plane.cut(plane.table.engine_of("r"))
            most.clear()
            await take(generation, tokens, 60)
            assert generation._client.num_running == 0
        assert tokens["r"] == expected_tokens(PROMPT, 60)
        assert not [i for i in plane.table._released if i.endswith("~3")]


def test_which_errors_are_losses():
    cause = RayTaskError("f", "", ValueError("x")).as_instanceof_cause()
    assert not _is_loss(cause) and not _is_loss(KeyError("x"))
    assert not _is_loss(BackPressureError(num_queued_requests=1, max_queued_requests=1))
    assert _is_loss(ActorDiedError()) and _is_loss(EngineDead("x"))
    assert _is_loss(RayTaskError("f", "", EngineDead("x")).as_instanceof_cause())


async def test_a_call_is_no_part_of_the_request_that_makes_it():
    mine: ContextVar[str] = ContextVar("mine", default="")
    async with open_plane(num_engines=1) as plane:
        seen: list[str] = []
        plane.handle.set_limit(0)  # or the call would end with the request
        plane.handle.generate.remote = lambda *_: seen.append(mine.get()) or LocalCall(idle())
        mine.set("request")
        with plane.client.start([request("r")]):
            await asyncio.sleep(0)
        assert seen == [""]


async def idle() -> None:
    await asyncio.Event().wait()
