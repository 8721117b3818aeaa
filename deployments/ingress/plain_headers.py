"""Keeps from Ray Serve what it cannot read, and from logs what they should not hold."""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.ingress.request_ids import without_odd_ids


class PlainHeaders:
    """ASGI middleware that leaves out headers whose values are not ASCII, and odd request ids.

    HTTP allows any byte there, but Serve takes a request's id, session and model for UTF-8, and
    answers 500 to others. It makes an id where there is none, and has all in logs and answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if "headers" in scope:
            headers = (header for header in scope["headers"] if header[1].isascii())
            scope["headers"] = without_odd_ids(headers)
        await self._app(scope, receive, send)


def before_serve() -> list[Middleware]:
    """What `SERVE_MIDDLEWARE` of `deployments/flags.py` names: Serve calls this in each process
    that speaks HTTP."""
    return [Middleware(PlainHeaders)]
