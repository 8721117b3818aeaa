"""An ingress that turns newcomers away while those that have come in finish."""

from __future__ import annotations

import asyncio

import httpx

from deployments.ingress.draining import Draining


async def test_newcomers_are_refused_and_others_finish():
    release = asyncio.Event()

    async def app(scope, receive, send):
        if scope["path"] == "/slow":
            await release.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    draining = Draining(app)
    transport = httpx.ASGITransport(draining)
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
