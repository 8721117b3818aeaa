"""The ingress's application over an engine in this very process: no Ray, no sockets.

What it answers is what a server answers, since it is the same code from the body to the loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing, asynccontextmanager
from types import SimpleNamespace
from typing import Any

from starlette.types import ASGIApp, Message

from deployments.cli.client import Answer
from deployments.config import ModelOptions
from deployments.engine_actor import EngineActor, StartCore
from deployments.engine_client import EngineClient
from deployments.ingress.app import build_asgi_app
from deployments.ingress.deployment import load_served_model
from deployments.ingress.options import IngressOptions
from deployments.ingress.served import ServedModels
from deployments.load_table import LoadTable
from deployments.placement import Booking
from deployments.trunk import TrunkHub
from engine.startup import start_engine

ENGINE_ID = "local"
MANY = 2**31
"""The engine takes whatever comes: who calls it bounds what is under way."""
LOOK_S = 0.02
"""A request that the engine cannot take now looks this often whether it can."""


@asynccontextmanager
async def open_local_app(
    name: str, model: ModelOptions, start_core: StartCore = start_engine
) -> AsyncIterator[ASGIApp]:
    """Start an engine and the application that serves it, to this process alone: API keys that the
    environment holds for a server's clients are not asked for.

    Args:
        name: under which requests name the model.
        model: what to start.
        start_core: makes the engine's core.

    Raises:
        ConfigError: the model or an option cannot be used.
    """
    options = IngressOptions(max_concurrent_requests=MANY, allow_request_chat_templates=True)
    engine = EngineActor(model.engine, start_core)
    await engine.start()
    table = LoadTable()
    hub = TrunkHub("local", table, connect=lambda _: _Link(engine))
    handle = _Handle(table)
    client = EngineClient(handle, hub, table, model.engine.enable_prefix_caching)
    try:
        table.set_members(client.deployment, [ENGINE_ID])
        hub.follow(client.deployment)
        served = await asyncio.to_thread(load_served_model, name, model, options, client)
        while not served.ready:
            await asyncio.sleep(0.01)
        yield build_asgi_app(ServedModels({name: served}), options, asks_for_keys=False)
    finally:
        table.set_members(client.deployment, [])
        await engine.drain()


class _Link:
    """The calls that an ingress makes to an engine actor, made in this event loop."""

    def __init__(self, engine: EngineActor) -> None:
        self._engine = engine
        self._calls: set[asyncio.Future[None]] = set()

    async def subscribe(self, subscriber_id: str) -> AsyncIterator[bytes]:
        async with aclosing(self._engine.subscribe(subscriber_id)) as messages:  # type: ignore[type-var]
            async for message in messages:
                yield message

    def submit(self, batch: bytes) -> Awaitable[None]:
        return asyncio.ensure_future(self._engine.submit(batch))

    def acknowledge(self, subscriber_id: str, count: int) -> None:
        self._keep(asyncio.ensure_future(self._engine.acknowledge(subscriber_id, count)))

    def abort(self, request_ids: list[str]) -> None:
        self._keep(asyncio.ensure_future(self._engine.abort(request_ids)))

    def _keep(self, call: asyncio.Future[None]) -> None:
        self._calls.add(call)  # the event loop itself would not keep it
        call.add_done_callback(self._calls.discard)


class _Handle:
    """What stands for a Serve handle: its calls book in the table and stay open, as Serve's do
    until the request ends, and then are dropped."""

    deployment_name = "Engine-local"

    def __init__(self, table: LoadTable) -> None:
        self._table = table
        self.generate = SimpleNamespace(remote=self._call)

    def _call(self, booking: Booking) -> asyncio.Future[None]:
        return asyncio.ensure_future(self._run(booking))

    async def _run(self, booking: Booking) -> None:
        while self._table.book({ENGINE_ID: MANY}, booking) is None:  # a step takes long, or failed
            await asyncio.sleep(LOOK_S)
        await asyncio.Event().wait()


async def post_to(app: ASGIApp, path: str, body: bytes) -> Answer:
    """Have an ASGI application answer a JSON body; returns the whole answer."""
    parts: list[Message] = []
    request = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Message:
        if (message := next(request, None)) is None:
            await asyncio.Event().wait()  # the client stays to the end
        return message or {}

    async def send(message: Message) -> None:
        parts.append(message)

    await app(_scope(path, body), receive, send)
    start = parts[0]
    headers = {name.decode(): value.decode() for name, value in start["headers"]}
    return Answer(start["status"], headers, b"".join(part.get("body", b"") for part in parts))


def _scope(path: str, body: bytes) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ],
        "client": None,
        "server": None,
    }
