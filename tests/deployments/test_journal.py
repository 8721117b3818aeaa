"""What is told of a request at its end, and under which id."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import asynccontextmanager
from types import SimpleNamespace

import httpx
import pytest

from deployments.failover import FailoverLimits
from deployments.ingress.app import build_asgi_app
from deployments.ingress.journal import Journal
from deployments.ingress.plain_headers import PlainHeaders
from deployments.ingress.request_ids import request_id
from deployments.ingress.request_record import RequestRecord
from deployments.ingress.served import ServedModels
from tests.deployments.plane import OPTIONS, open_plane

LOGGER = "trunkline.requests"
PROMPT = "Pfirsich Melba"
ODD = [b"two\nlines", b"x" * 129, "schön".encode(), b"", b"a b", b'"', b"$(reboot)", b"\x1b[2J"]


@asynccontextmanager
async def told(caplog, log_requests=True, **fake):
    """A plane whose application tells of requests, and the lines that it wrote."""
    caplog.set_level(logging.INFO, LOGGER)
    async with open_plane(**fake) as plane:
        models = ServedModels({"m": plane.model})
        app = build_asgi_app(models, OPTIONS, journal=Journal(log_requests))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as plane.http:
            yield plane, lambda: lines_of(caplog)


def lines_of(caplog):
    return [record for record in caplog.records if record.name == LOGGER]


def body(**more):
    return {"model": "m", "prompt": PROMPT, "max_tokens": 5, **more}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_line_tells_what_a_request_took(caplog, stream):
    async with told(caplog, step_s=0.001) as (plane, lines):
        headers = {"x-request-id": "mine-1"}
        asked = body(n=2, stream=stream)
        await plane.http.post("/v1/completions", json=asked, headers=headers)
        (line,) = lines()
    assert (line.levelname, line.request_id, line.model) == ("INFO", "mine-1", "m")
    assert (line.path, line.status, line.error_type) == ("/v1/completions", 200, None)
    assert (line.prompt_tokens, line.output_tokens, line.cached_tokens) == (6, 10, 0)
    assert (line.finish_reason, line.failovers, line.engines) == ("length", 0, ["e0"])
    assert 0 < line.ttft_s < line.duration_s
    assert not {"Pfirsich", "Melba"} & set(str(vars(line)).split())


async def test_lines_are_off_by_default_but_for_failures(caplog):
    async with told(caplog, log_requests=False) as (plane, lines):
        await plane.http.post("/v1/completions", json=body())
        await plane.http.post("/v1/completions", json=body(max_tokens=-1))
        assert lines() == []
        plane.handle.failure = KeyError("no such thing")
        await plane.http.post("/v1/completions", json=body())
        (line,) = lines()
    assert (line.levelname, line.status, line.error_type) == ("WARNING", 500, "server_error")


async def test_an_error_after_the_status_is_told(caplog, most):
    most[""] = 1
    async with told(caplog, log_requests=False, step_s=0.005) as (plane, lines):
        plane.client.failover = FailoverLimits(max_barren_tries=0)
        asked = body(stream=True, max_tokens=200)
        answer = asyncio.ensure_future(plane.http.post("/v1/completions", json=asked))
        await plane.until(lambda: any(view.load.num_running for view in plane.view()))
        plane.links["e0"].broken.set()
        await answer
        (line,) = lines()
    assert (line.levelname, line.status, line.error_type) == ("WARNING", 200, "engine_lost")
    assert line.output_tokens < 200 and line.finish_reason == "abort"


async def test_refusals_are_told_without_alarm(caplog):
    async with told(caplog) as (plane, lines):
        await plane.http.post("/v1/completions", json=body(max_tokens=-1))
        await plane.http.get("/health")
        (line,) = lines()
    assert (line.levelname, line.status) == ("INFO", 400)
    assert line.error_type == "invalid_request_error"


async def test_a_client_that_leaves_is_told(caplog, most):
    most[""] = 1
    async with told(caplog, step_s=0.005) as (plane, lines):
        asked = asyncio.ensure_future(plane.http.post("/v1/completions", json=body(max_tokens=200)))
        await plane.until(lambda: plane.client.num_running == 1)
        asked.cancel()
        await plane.until(lines)
        await plane.idle()
        (line,) = lines()
    assert (line.levelname, line.status, line.finish_reason) == ("INFO", 499, "abort")


def job(first_token_time):
    metrics = {"first_token_time": first_token_time, "finished_time": None, "queued_s": 0.0}
    metrics["prefill_s"] = 0.0 if first_token_time is None else 0.01
    completion = SimpleNamespace(num_cached_tokens=0, token_ids=[], finish_reason=None)
    processors = {"c": completion}
    metrics = SimpleNamespace(**metrics)
    return SimpleNamespace(metrics=metrics, processors=processors, prompt_token_ids=[1])


def test_the_first_token_of_any_prompt_is_told(caplog):
    """Others may not have begun when the client leaves."""
    caplog.set_level(logging.INFO, LOGGER)
    record = RequestRecord("r", "/v1/completions", begun_at=100.0)
    record.admit("m")
    record.send([job(101.5), job(None)])
    Journal(log_requests=True).tell(record)
    (line,) = lines_of(caplog)
    assert line.ttft_s == 1.5


async def test_a_failover_is_told(caplog, most):
    most[""] = 1
    async with told(caplog, num_engines=2, step_s=0.005) as (plane, lines):
        asked = asyncio.ensure_future(plane.http.post("/v1/completions", json=body(max_tokens=50)))
        await plane.until(lambda: any(view.load.num_running for view in plane.view()))
        (busy,) = (view.engine_id for view in plane.view() if view.load.num_running)
        plane.links[busy].broken.set()
        most.clear()
        assert (await asked).status_code == 200
        (line,) = lines()
    assert line.failovers == 1 and set(line.engines) == {"e0", "e1"}
    assert line.output_tokens == 50


@pytest.mark.parametrize("value", ODD)
def test_an_odd_id_is_replaced(value):
    made = request_id([(b"x-request-id", value)])
    assert len(made) == 32 and made.isalnum()


async def test_serve_never_sees_an_odd_id():
    """It would tell it in logs and answers; without one it makes its own."""
    seen = []

    async def serve(scope, receive, send):
        seen.append(scope["headers"])

    for value in [*ODD, b"fine/1"]:
        headers = [(b"x-request-id", value), (b"accept", b"*/*")]
        await PlainHeaders(serve)({"headers": headers}, None, None)
    assert seen[:-1] == [[(b"accept", b"*/*")]] * len(ODD)
    assert (b"x-request-id", b"fine/1") in seen[-1]


async def test_what_engines_are_sent_names_the_request(caplog):
    """Under ids of their own, as a client may send one of its own twice."""
    async with told(caplog) as (plane, _):
        submitted = []
        submit = plane.actors["e0"].submit

        async def noting(batch):
            submitted.append(batch)
            await submit(batch)

        plane.actors["e0"].submit = noting
        headers = {"x-request-id": "mine-2"}
        asked = [plane.http.post("/v1/completions", json=body(), headers=headers) for _ in "ab"]
        answers = await asyncio.gather(*asked)
    assert [answer.status_code for answer in answers] == [200, 200]
    assert b"".join(submitted).count(b"mine-2") == 2
    assert len({json.loads(answer.text)["id"] for answer in answers}) == 2
