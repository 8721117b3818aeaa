"""One HTTP exchange: read the body, run the handler, stop it when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deployments.ingress.errors import ApiError, to_api_error


class EventStream:
    """A `text/event-stream` answer.

    Args:
        events: gives the bytes to send.
        source: what `events` reads from, which has begun already. It is closed as well, because
            closing `events` does nothing as long as that has not begun.
    """

    def __init__(
        self, events: AsyncGenerator[bytes, None], source: AsyncGenerator[Any, None]
    ) -> None:
        self._events = events
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send event after event; what the generator yields leaves at once."""
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        async with aclosing(self._source), aclosing(self._events) as events:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


Handler = Callable[[Request, bytes], Awaitable[Response | EventStream]]


class Endpoint:
    """An ASGI application around a handler, which is cancelled as soon as the client has gone.

    Done here because Serve's proxies differ in whether and how they tell of a disconnect.
    """

    def __init__(self, handler: Handler, max_body_bytes: int) -> None:
        self._handler = handler
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        request = Request(scope, receive)
        try:
            body = await _read_body(receive, self._max_body_bytes)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if body is not None:
            work = asyncio.ensure_future(_answer(self._handler, request, body, send))
            await _run_until_disconnect(work, receive)


async def _answer(handler: Handler, request: Request, body: bytes, send: Send) -> None:
    response: Any
    try:
        response = await handler(request, body)
    except Exception as error:
        response = to_api_error(error).response()
    await response(request.scope, request.receive, send)


async def _read_body(receive: Receive, limit: int) -> bytes | None:
    """The whole body, or None when the client left before its end."""
    chunks, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > limit:
            raise ApiError(
                413,
                f"The request body is longer than {limit} bytes; send less.",
                "invalid_request_error",
                code="body_too_large",
            )
        more = message.get("more_body", False)
    return b"".join(chunks)


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
