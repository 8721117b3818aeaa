"""The end of an ingress replica's service: who has come in may finish, nobody else comes in."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.ingress.errors import ApiError

RETRY_AFTER_S = 1
LIVENESS_PATH = "/health"
"""Still tells of the engines: a process that drains is not one that should be killed."""


class Draining:
    """ASGI middleware that counts the requests under way and can turn others away.

    Args:
        app: what is behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.ending = False
        """Whether requests that come are refused."""
        self.num_running = 0
        """Requests whose answers have not been written to their end."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http" or scope["path"] == LIVENESS_PATH:
            await self._app(scope, receive, send)
        elif self.ending:
            await _refusal().response()(scope, receive, send)
        else:
            self.num_running += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self.num_running -= 1


def _refusal() -> ApiError:
    return ApiError(
        503,
        "The server is about to stop; try again, there or on another one.",
        "service_unavailable",
        code="server_stopping",
        retry_after_s=RETRY_AFTER_S,
    )
