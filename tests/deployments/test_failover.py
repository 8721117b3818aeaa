"""Requests whose engines are lost: what goes on, what it says, and when it is given up."""

from __future__ import annotations

import asyncio
import time
from contextvars import ContextVar

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError, RequestCancelledError

from deployments import engine_actor, failover, trunk, watchdog
from deployments.failover import FailoverLimits, _is_loss
from deployments.placement import Booking
from deployments.wire import decode_submission, encode
from engine.errors import EngineDead
from engine.outputs import TokenDelta, TokenLogprobs
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams
from tests.deployments.fake_core import expected_tokens
from tests.deployments.plane import DEPLOYMENT, LocalCall, Plane, open_plane

PROMPT = [5, 6, 7, 8, 9]


def request(request_id: str, max_tokens: int = 60, **params) -> EngineRequest:
    return EngineRequest(
        request_id, PROMPT, SamplingParams(max_tokens=max_tokens, seed=1, **params)
    )


async def cut(plane: Plane, engine_id: str, *, for_good: bool = False) -> None:
    """Break the trunk to an engine."""
    plane.links[engine_id].broken.set()
    await plane.until(lambda: engine_id not in plane.hub._links)
    if not for_good:
        plane.links[engine_id].broken.clear()


async def take(generation, tokens: dict[str, list[int]], until: int) -> None:
    """Collect tokens until so many have come of one request."""
    async for deltas in generation:
        for delta in deltas:
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
        if max(map(len, tokens.values())) >= until:
            return


async def test_a_request_goes_on_elsewhere_and_no_token_is_lost_or_repeated():
    async with open_plane(num_engines=2, step_s=0.005) as plane:
        tokens: dict[str, list[int]] = {}
        with plane.client.start([request("r")]) as generation:
            await take(generation, tokens, 10)
            first = plane.table.engine_of("r")
            await cut(plane, first)
            await plane.until(lambda: plane.table.engine_of("r~2") is not None)
            assert plane.table.engine_of("r~2") != first
            await take(generation, tokens, 60)
        assert tokens == {"r": expected_tokens(PROMPT, 60)}
        await plane.idle()  # the first engine, which was only cut off, has been told to stop
        assert plane.client.num_running == 0 and not plane.hub._receivers


async def test_again_and_again_and_with_what_is_not_yet_read():
    async with open_plane(num_engines=2, step_s=0.005) as plane:
        wire = request("r", 1500)
        with plane.client.start([wire]) as generation:
            for number in range(1, 8):
                name = "r" if number == 1 else f"r~{number}"
                await plane.until(lambda number=number: len(wire.output_token_ids) > 100 * number)
                await cut(plane, plane.table.engine_of(name))
                await asyncio.sleep(0.7)  # until the trunk is read anew
            tokens: dict[str, list[int]] = {}
            await take(generation, tokens, 1500)
        assert tokens["r"] == expected_tokens(PROMPT, 1500)


async def test_only_those_of_the_lost_engine_move():
    async with open_plane(num_engines=2, step_s=0.005) as plane:
        tokens: dict[str, list[int]] = {}
        with plane.client.start([request(f"r{i}") for i in range(4)]) as generation:
            await take(generation, tokens, 10)
            lost = {f"r{i}" for i in range(4) if plane.table.engine_of(f"r{i}") == "e0"}
            assert len(lost) == 2
            await cut(plane, "e0")
            moved = {
                name for name in (f"r{i}" for i in range(4)) if name not in plane.hub._receivers
            }
            assert moved == lost
            async for deltas in generation:
                for delta in deltas:
                    tokens[delta.request_id] += delta.token_ids
        assert tokens == {f"r{i}": expected_tokens(PROMPT, 60) for i in range(4)}


async def test_a_text_is_the_same_as_without_the_loss():
    body = {"model": "m", "prompt": "one two three", "max_tokens": 60, "stop": ["never"]}
    async with open_plane(num_engines=2, step_s=0.005) as plane:
        whole = (await plane.http.post("/v1/completions", json=body)).json()
        answer = asyncio.ensure_future(plane.http.post("/v1/completions", json=body))
        await plane.until(lambda: any(view.load.num_running for view in plane.view()))
        await asyncio.sleep(0.1)
        await cut(plane, next(v.engine_id for v in plane.view() if v.load.num_running))
        parted = (await answer).json()
    assert parted["choices"] == whole["choices"] and parted["usage"] == whole["usage"]


async def test_it_waits_for_a_new_engine():
    async with open_plane(num_engines=1, step_s=0.005) as plane:
        tokens: dict[str, list[int]] = {}
        with plane.client.start([request("r")]) as generation:
            await take(generation, tokens, 10)
            await cut(plane, "e0")  # it is read anew half a second later
            assert not plane.hub.connected(DEPLOYMENT)
            await take(generation, tokens, 60)
        assert tokens["r"] == expected_tokens(PROMPT, 60)


async def test_without_an_engine_it_ends_with_an_error_in_time():
    async with open_plane(num_engines=1, step_s=0.005) as plane:
        with plane.client.start([request("r"), request("s")]) as generation:
            await anext(generation)
            await cut(plane, "e0", for_good=True)
            with pytest.raises(EngineDead, match="no engine could go on"):
                async with asyncio.timeout(5):
                    async for _ in generation:
                        pass
        assert plane.client.num_running == 0


async def test_a_request_in_line_does_not_wait_for_ever_either():
    async with open_plane(num_engines=1) as plane:
        plane.table._state("e0").close(plane.table._clock() + 1e6)  # it takes nothing
        with plane.client.start([request("r")]) as generation:
            await asyncio.sleep(0.05)
            await cut(plane, "e0", for_good=True)
            with pytest.raises(EngineDead):
                async with asyncio.timeout(5):
                    await anext(generation)


async def test_a_silent_engine_is_lost(monkeypatch):
    monkeypatch.setattr(trunk, "SILENCE_LIMIT_S", 1.5)
    async with open_plane(num_engines=2, step_s=0.02) as plane:
        tokens: dict[str, list[int]] = {}
        with plane.client.start([request("r", 100)]) as generation:
            await take(generation, tokens, 5)
            engine = plane.actors[plane.table.engine_of("r")]
            engine._ticker.cancel()
            engine._loop._on_step = lambda deltas, load: None  # it hangs
            await take(generation, tokens, 100)
        assert tokens["r"] == expected_tokens(PROMPT, 100)


async def test_an_idle_engine_says_at_once_that_it_lives(monkeypatch):
    monkeypatch.setattr(engine_actor, "HEARTBEAT_S", 1000.0)
    async with open_plane(num_engines=2, step_s=0.005) as plane:
        tokens: dict[str, list[int]] = {}
        with plane.client.start([request("r")]) as generation:
            await take(generation, tokens, 10)
            await cut(plane, plane.table.engine_of("r"), for_good=True)
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


async def test_what_breaks_every_engine_is_given_up(monkeypatch):
    monkeypatch.setattr(failover, "LATE_TOKENS_S", 60)  # no call outlives its try
    async with open_plane(num_engines=4, step_s=0.001, die_at_token=5) as plane:
        with plane.client.start([request("r")]) as generation:
            deltas = [delta async for each in generation for delta in each]
    assert [d.token_ids for d in deltas[:-1] if d.token_ids]
    assert deltas[-1].finish_reason == "error"
    assert plane.client.num_running == 0


async def test_backpressure_is_an_answer_for_new_requests_only():
    async with open_plane(num_engines=2, step_s=0.005) as plane:
        full = BackPressureError(num_queued_requests=1, max_queued_requests=1)
        tokens: dict[str, list[int]] = {}
        with plane.client.start([request("r")]) as generation:
            await take(generation, tokens, 10)
            plane.handle.failure = full
            await cut(plane, plane.table.engine_of("r"))
            await asyncio.sleep(0.2)
            with plane.client.start([request("s")]) as other, pytest.raises(BackPressureError):
                await anext(other)
            plane.handle.failure = None
            await take(generation, tokens, 60)
        assert tokens["r"] == expected_tokens(PROMPT, 60)


async def test_the_end_of_a_client_ends_every_try():
    async with open_plane(num_engines=2, step_s=0.005) as plane:
        with plane.client.start([request("r", 100_000)]) as generation:
            await anext(generation)
            await cut(plane, plane.table.engine_of("r"))
            await plane.until(lambda: plane.table.engine_of("r~2") is not None)
        await plane.idle()
        assert all(view.num_booked == 0 for view in plane.view())


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


async def test_a_try_has_one_engine_that_tells_of_it():
    async with open_plane(num_engines=1, step_s=0.05) as plane:
        with plane.client.start([request("r")]) as generation:
            flight = generation._flights["r"]
            flight.add(TokenDelta("r", [5]), "e0")
            flight.add(TokenDelta("r", [5]), "e1")  # Serve has sent the call twice
            flight.add(TokenDelta("r", [6]), "e0")
            assert flight.request.output_token_ids == [5, 6]


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


async def test_few_tokens_are_no_success():
    async with open_plane(num_engines=1, step_s=60) as plane:
        with plane.client.start([request("r", 1000)]) as generation:
            flight = generation._flights["r"]
            for length in (1, 1, 1):
                flight.add(TokenDelta("r", [5] * length), "e0")
                flight._fall(TokenDelta("r", [], finish_reason="error", error="broken"))
                if flight._next_try is not None:
                    flight._next_try.cancel()
                    flight._try_again()
            assert flight._over


async def test_calls_that_fail_in_odd_ways_hang_nobody(monkeypatch):
    def cancel(call: LocalCall) -> None:
        call.task.cancel()
        raise BackPressureError(num_queued_requests=1, max_queued_requests=1)

    monkeypatch.setattr(LocalCall, "cancel", cancel)
    async with open_plane(num_engines=2, step_s=0.005) as plane:
        plane.handle.failure = BackPressureError(num_queued_requests=1, max_queued_requests=1)
        with plane.client.start([request("s")]) as other, pytest.raises(BackPressureError):
            async with asyncio.timeout(5):
                await anext(other)
        plane.handle.failure = None
        tokens: dict[str, list[int]] = {}
        with plane.client.start([request("r")]) as generation:
            await take(generation, tokens, 10)
            await cut(plane, plane.table.engine_of("r"))
            await take(generation, tokens, 60)
        assert tokens["r"] == expected_tokens(PROMPT, 60)


async def test_its_own_cancellation_is_no_second_loss(monkeypatch):
    async def settle(call: LocalCall) -> str:
        try:
            return await asyncio.shield(call.task)
        except asyncio.CancelledError:
            for _ in range(3):
                await asyncio.sleep(0)
            raise RequestCancelledError from None

    monkeypatch.setattr(LocalCall, "__await__", lambda call: settle(call).__await__())
    async with open_plane(num_engines=3, step_s=0.005) as plane:
        tokens: dict[str, list[int]] = {}
        with plane.client.start([request("r")]) as generation:
            await take(generation, tokens, 10)
            await cut(plane, plane.table.engine_of("r"))
            await take(generation, tokens, 60)
            assert generation._client.num_running == 0
        assert tokens["r"] == expected_tokens(PROMPT, 60)
        assert not [i for i in plane.table._released if i.endswith("~3")]


async def test_a_long_wait_in_line_is_no_loss():
    async with open_plane(num_engines=1, step_s=0.005) as plane:
        plane.client.failover = FailoverLimits(timeout_s=1.0)
        plane.table._state("e0").close(plane.table._clock() + 2.0)  # it takes nothing for a while
        tokens: dict[str, list[int]] = {}
        with plane.client.start([request("r")]) as generation:
            await asyncio.sleep(0.05)
            await cut(plane, "e0")  # for half a second; the limit is one
            await take(generation, tokens, 60)
        assert tokens["r"] == expected_tokens(PROMPT, 60)


async def test_a_request_that_begins_without_an_engine_has_a_limit():
    async with open_plane(num_engines=1) as plane:
        await cut(plane, "e0", for_good=True)
        with plane.client.start([request("r")]) as generation, pytest.raises(EngineDead):
            async with asyncio.timeout(5):
                await anext(generation)


def test_which_errors_are_losses():
    cause = RayTaskError("f", "", ValueError("x")).as_instanceof_cause()
    assert not _is_loss(cause) and not _is_loss(KeyError("x"))
    assert not _is_loss(BackPressureError(num_queued_requests=1, max_queued_requests=1))
    assert _is_loss(ActorDiedError()) and _is_loss(EngineDead("x"))
    assert _is_loss(RayTaskError("f", "", EngineDead("x")).as_instanceof_cause())


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
        plane.table._state("e0").close(plane.table._clock() + 60.0)
        with plane.client.start([request("s")]):
            await asyncio.sleep(0.02)  # it stands in line
        assert len(cancelled) == 1


async def test_an_engine_that_runs_for_nobody_is_told_again(monkeypatch):
    monkeypatch.setattr(trunk, "ABORT_LIMIT_S", 0.05)
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


async def test_a_request_that_serve_sends_twice_runs_once():
    async with open_plane(num_engines=2, step_s=0.005) as plane:
        tokens: dict[str, list[int]] = {}
        with plane.client.start([request("r", 100_000)]) as generation:
            await take(generation, tokens, 5)
            (other,) = plane.actors.keys() - {plane.table.engine_of("r")}
            submission = decode_submission(generation._flights["r"]._submission)
            await plane.actors[other].submit(encode([submission]))
            loop = plane.actors[other]._loop
            await plane.until(lambda: loop._num_received == 1 and not loop._core.has_work)
            await take(generation, tokens, len(tokens["r"]) + 10)
        assert tokens["r"] == expected_tokens(PROMPT, len(tokens["r"]))


async def test_serve_sends_nothing_on_for_a_client_that_has_left():
    async with open_plane(num_engines=2, step_s=0.005) as plane:
        tokens: dict[str, list[int]] = {}
        with plane.client.start([request("r", 100_000)]) as generation:
            await take(generation, tokens, 5)
        with pytest.raises(EngineDead):
            plane.table.book(dict.fromkeys(plane.actors, 1000), Booking("r", 5))


async def test_a_call_is_no_part_of_the_request_that_makes_it():
    mine: ContextVar[str] = ContextVar("mine", default="")
    async with open_plane(num_engines=1) as plane:
        seen: list[str] = []
        plane.handle.generate.remote = lambda *_: seen.append(mine.get()) or LocalCall(idle())
        mine.set("request")
        with plane.client.start([request("r")]):
            await asyncio.sleep(0)
        assert seen == [""]


async def idle() -> None:
    await asyncio.Event().wait()
