"""What an ingress sends to engines, with engines that only note it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextvars import ContextVar

import pytest

from deployments.dispatch import Dispatch
from deployments.wire import Submission, decode_submissions, encode
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams
from tests.deployments.fake_core import expected_tokens
from tests.deployments.flights import PROMPT, request
from tests.deployments.plane import open_plane

WANTED = set("abcde")
CALLER: ContextVar[str] = ContextVar("caller", default="")


class NotingLink:
    def __init__(self, failure: Exception | None = None) -> None:
        self.submitted: list[list[str]] = []
        self.aborted: list[list[str]] = []
        self.callers: list[str] = []
        self._failure = failure

    def subscribe(self, subscriber_id: str) -> AsyncIterator[bytes]:
        raise NotImplementedError

    def acknowledge(self, subscriber_id: str, count: int) -> None:
        raise NotImplementedError

    def submit(self, batch: bytes) -> asyncio.Future[None]:
        self.callers.append(CALLER.get())
        self.submitted.append([item.request.request_id for item in decode_submissions(batch)])
        taken = asyncio.get_running_loop().create_future()
        if self._failure is None:
            taken.set_result(None)
        else:
            taken.set_exception(self._failure)
        return taken

    def abort(self, request_ids: list[str]) -> None:
        self.callers.append(CALLER.get())
        self.aborted.append(request_ids)


class Refusals(list[tuple[str, list[str]]]):
    def note(self, engine_id, request_ids) -> None:
        self.append((engine_id, list(request_ids)))


@pytest.fixture
async def refusals():
    return Refusals()


@pytest.fixture
async def dispatch(refusals):
    return Dispatch(WANTED, refusals.note)


def submit(dispatch: Dispatch, *request_ids: str) -> None:
    for request_id in request_ids:
        item = Submission("x", EngineRequest(request_id, [1, 2], SamplingParams(seed=0)))
        dispatch.submit(request_id, encode(item), "e")


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_the_first_request_of_a_turn_leaves_at_once_and_all_others_together(dispatch):
    link = NotingLink()
    dispatch.open("e", link)
    submit(dispatch, "a", "b", "c")
    assert link.submitted == [["a"]]
    await turns()
    assert link.submitted == [["a"], ["b", "c"]]
    submit(dispatch, "d")
    assert link.submitted == [["a"], ["b", "c"], ["d"]]


async def test_aborts_of_a_turn_are_one_call(dispatch):
    link = NotingLink()
    dispatch.open("e", link)
    assert dispatch.abort("e", "c") and dispatch.abort("e", "d")
    await turns()
    assert link.aborted == [["c", "d"]]


async def test_calls_are_no_part_of_the_request_that_makes_them(dispatch):
    link = NotingLink()
    dispatch.open("e", link)
    CALLER.set("a request")
    submit(dispatch, "a", "b")
    dispatch.abort("e", "c")
    await turns()
    assert link.callers == ["", "", ""]


async def test_requests_may_be_booked_in_another_thread(dispatch):
    link = NotingLink()
    dispatch.open("e", link)
    await asyncio.to_thread(submit, dispatch, "a")
    await turns()
    assert link.submitted == [["a"]]


async def test_requests_wait_until_the_engine_is_open(dispatch):
    link = NotingLink()
    submit(dispatch, "a", "b", "c")
    await turns()
    assert not dispatch.abort("e", "b")
    dispatch.open("e", link)
    dispatch.open("e", link)  # with every message
    await turns()
    assert link.submitted == [["a", "c"]] and link.aborted == []


async def test_what_waits_for_a_lost_engine_is_dropped(dispatch):
    submit(dispatch, "a")
    await turns()
    assert not dispatch.close("e")
    link = NotingLink()
    dispatch.open("e", link)
    await turns()
    assert link.submitted == [] and dispatch.close("e")
    assert not dispatch.abort("e", "a")


async def test_what_another_thread_tells_too_late_is_dropped(dispatch):
    submit(dispatch, "gone", "a")
    assert list(dispatch._submissions["e"]) == ["a"]


async def test_an_abort_in_the_turn_of_its_request_reaches_the_engine_or_stops_it(dispatch):
    """Either the engine hears of both, or of neither: the call to its replica would wait on."""
    link = NotingLink()
    dispatch.open("e", link)
    for turns_between in range(4):
        name = f"r{turns_between}"
        submit(dispatch, name)
        for _ in range(turns_between):
            await asyncio.sleep(0)
        told = dispatch.abort("e", name)
        await turns()
        assert ([name] in link.submitted) == ([name] in link.aborted) == told


async def test_requests_that_cannot_even_be_sent_are_told(dispatch, refusals):
    link = NotingLink()
    dispatch.open("e", link)
    link.submit = raise_at_once
    submit(dispatch, "a", "b", "c")
    assert not refusals  # its caller is about to make Serve's call
    await turns()
    assert refusals == [("e", ["a"]), ("e", ["b", "c"])]


def raise_at_once(batch: bytes) -> asyncio.Future[None]:
    raise MemoryError("no room for the batch")


async def test_requests_that_an_engine_did_not_take_are_told(dispatch, refusals, caplog):
    dispatch.open("e", NotingLink(RuntimeError("lost on the way\nsecret")))
    submit(dispatch, "a", "b", "c")
    await turns()
    assert refusals == [("e", ["a"]), ("e", ["b", "c"])]
    assert "engine e did not take 2 requests (RuntimeError: lost on the way)" in caplog.text
    assert "secret" not in caplog.text


async def test_requests_that_an_engine_did_not_take_go_on_elsewhere(monkeypatch):
    async with open_plane(num_engines=2, step_s=0.005) as plane:
        link, lost = plane.links["e0"], []

        async def lose(batch: bytes) -> None:
            monkeypatch.undo()
            lost.append(len(decode_submissions(batch)))
            raise RuntimeError("lost on the way")

        monkeypatch.setattr(link, "submit", lose)
        requests = [request(f"r{i}") for i in range(8)]
        with plane.client.start(requests) as generation:
            ended = [d async for deltas in generation for d in deltas if d.finish_reason]
        assert lost and [each.finish_reason for each in ended] == ["length"] * 8
        assert [each.output_token_ids for each in requests] == [expected_tokens(PROMPT, 60)] * 8
