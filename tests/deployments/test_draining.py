"""An ingress that turns newcomers away while those that have come in finish."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from deployments.ingress.app import build_asgi_app
from deployments.ingress.draining import DrainGate, Draining
from deployments.ingress.options import IngressOptions
from deployments.ingress.request_counts import AnswerCounts
from deployments.ingress.served import ServedModels


async def test_newcomers_are_refused_and_others_finish():
    release = asyncio.Event()

    async def app(scope, receive, send):
        if scope["path"] == "/slow":
            await release.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    draining = Draining()
    transport = httpx.ASGITransport(DrainGate(app, draining, AnswerCounts()))
    async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
        slow = asyncio.create_task(client.get("/slow"))
        while not draining.num_running:
            await asyncio.sleep(0)
        draining.ending = True
        refused = await client.get("/v1/models")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["error"]["code"] == "server_stopping"
        assert (await client.get("/ready")).status_code == 503
        assert (await client.get("/health")).status_code == 200
        assert draining.num_running == 1
        release.set()
        assert (await slow).text == "done"
    assert draining.num_running == 0


@pytest.mark.parametrize("prefix", ["", "/llm"])
async def test_what_asks_whether_it_lives_is_answered_while_it_drains(prefix):
    draining = Draining(ending=True)
    app = build_asgi_app(ServedModels(), IngressOptions(), draining)
    transport = httpx.ASGITransport(app, root_path=prefix)
    async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
        statuses = {
            path: (await client.get(prefix + path)).status_code
            for path in ("/health", "/ping", "/ready", "/v1/models")
        }
    assert statuses == {"/health": 200, "/ping": 200, "/ready": 503, "/v1/models": 503}


async def test_pages_are_shown_the_refusal():
    page = "https://chat.example.com"
    options = IngressOptions(cors_allow_origins=[page])
    transport = httpx.ASGITransport(build_asgi_app(ServedModels(), options, Draining(ending=True)))
    async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
        refused = await client.get("/v1/models", headers={"Origin": page})
    assert refused.status_code == 503
    assert refused.headers["access-control-allow-origin"] == page
