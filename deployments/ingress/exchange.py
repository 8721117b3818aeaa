"""One HTTP exchange: read the body, run the handler, stop it when the client leaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.ingress.bodies import Bodies, HeldBody
from deployments.ingress.claims import Claims
from deployments.ingress.errors import ApiError, to_api_error
from deployments.ingress.journal import Journal
from deployments.ingress.request_record import RequestRecord

Handler = Callable[[Request, bytes], Awaitable[ASGIApp]]
"""From a request and its body to the response, which is an ASGI application."""
PIECE_BYTES = 2**16
"""Of a long answer, written at once."""


class Endpoint:
    """An ASGI application around a handler, which is cancelled as soon as the client has gone.

    Done here because Serve's proxies differ in whether and how they tell of a disconnect.

    Args:
        handler: makes the response.
        bodies: takes in the requests' bodies.
        journal: tells of each request at its end.
        reads_body: whether the handler needs the body; else what comes is dropped.
    """

    def __init__(
        self, handler: Handler, bodies: Bodies, journal: Journal, reads_body: bool = True
    ) -> None:
        self._handler = handler
        self._bodies = bodies
        self._journal = journal
        self._reads_body = reads_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        record = self._journal.open(scope)
        try:
            body = await self._read(scope, receive)
        except ApiError as error:
            record.status, record.failure = error.status, error
            self._journal.tell(record)
            response = error.response()
            response.headers["Connection"] = "close"  # nobody reads the rest of the body
            await response(scope, receive, send)
            return
        if body is None:
            return
        try:
            work = asyncio.ensure_future(self._answer(record, Request(scope), body, send))
            await _run_until_disconnect(work, receive)
        finally:
            body.release()

    async def _read(self, scope: Scope, receive: Receive) -> HeldBody | None:
        if not self._reads_body:
            return HeldBody(self._bodies, b"")
        return await self._bodies.read(scope, receive)

    async def _answer(
        self, record: RequestRecord, request: Request, body: HeldBody, send: Send
    ) -> None:
        response: Any
        record.read_at = time.monotonic()
        with self._journal.follow(record), Claims(request.scope["key_use"]) as claims:
            try:
                response = await self._handler(request, body.data)
                if claims.is_cache_hit is not None:
                    response.headers["X-Cache"] = "hit" if claims.is_cache_hit else "miss"
            except Exception as error:
                response = to_api_error(error).response()
            finally:
                body.release()  # what it asked for has limits of its own; a stream may last long
            if isinstance(response, Response):
                record.status, send = response.status_code, _in_pieces(send)
            await response(request.scope, request.receive, send)


def _in_pieces(send: Send) -> Send:
    """Waits for slow clients within a long answer: HTTP servers keep the whole of a message."""

    async def send_pieces(message: Message) -> None:
        body = message.get("body", b"")
        start = 0
        while len(body) - start > PIECE_BYTES:
            piece = body[start : start + PIECE_BYTES]
            await send({"type": message["type"], "body": piece, "more_body": True})
            start += PIECE_BYTES
        await send({**message, "body": body[start:]} if "body" in message else message)

    return send_pieces


async def _run_until_disconnect(work: asyncio.Future[None], receive: Receive) -> None:
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((work, watcher), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
    finally:
        for task in (work, watcher):
            task.cancel()
        await asyncio.gather(work, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
