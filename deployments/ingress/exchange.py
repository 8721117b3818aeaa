"""One HTTP exchange: read the body, run the handler, stop it when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.ingress.errors import ApiError, to_api_error

Handler = Callable[[Request, bytes], Awaitable[ASGIApp]]
"""From a request and its body to the response, which is an ASGI application."""


class Endpoint:
    """An ASGI application around a handler, which is cancelled as soon as the client has gone.

    Done here because Serve's proxies differ in whether and how they tell of a disconnect.

    Args:
        handler: makes the response.
        max_body_bytes: longest body.
        body_timeout_s: within which it must have come.
    """

    def __init__(self, handler: Handler, max_body_bytes: int, body_timeout_s: float) -> None:
        self._handler = handler
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        request = Request(scope, receive)
        try:
            _check_announced_length(scope, self._max_body_bytes)
            async with asyncio.timeout(self._body_timeout_s):
                body = await _read_body(receive, self._max_body_bytes)
        except TimeoutError:
            await _too_slow(self._body_timeout_s).response()(scope, receive, send)
            return
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


def _check_announced_length(scope: Scope, limit: int) -> None:
    """Refuse a body that says of itself that it is too long, before any of it is read.

    Lengths that are no numbers have been refused by the HTTP server.
    """
    for name, value in scope["headers"]:
        if name == b"content-length" and (len(value) > 18 or int(value) > limit):
            raise _too_large(limit)


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
            raise _too_large(limit)
        more = message.get("more_body", False)
    return b"".join(chunks)


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"The request body is longer than {limit} bytes; send less.",
        "invalid_request_error",
        code="body_too_large",
    )


def _too_slow(limit_s: float) -> ApiError:
    return ApiError(
        408,
        f"The request body did not come within {limit_s:g} s; send it faster, or less.",
        "invalid_request_error",
        code="body_too_slow",
    )


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
