"""The end of an ingress replica's service: who has come in may finish, nobody else comes in."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.ingress.errors import ApiError
from deployments.ingress.gate import path_in_app
from deployments.ingress.request_counts import AnswerCounts

RETRY_AFTER_S = 1
LIVENESS_PATHS = frozenset(("/health", "/ping"))
"""Answer as ever: a process that drains is not one that should be killed. (`/ready` is for those
who decide where requests go.)"""


@dataclass(slots=True)
class Draining:
    """How far an ingress replica's service has come to its end."""

    ending: bool = False
    """Whether requests that come are refused."""
    num_running: int = 0
    """Requests whose answers have not been written to their end."""


class DrainGate:
    """ASGI middleware that counts the requests under way and can turn others away.

    Args:
        app: what is behind it.
        draining: where it counts, and which says whether.
        answers: where refusals are counted.
    """

    def __init__(self, app: ASGIApp, draining: Draining, answers: AnswerCounts) -> None:
        self._app = app
        self._draining = draining
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http" or path_in_app(scope) in LIVENESS_PATHS:
            await self._app(scope, receive, send)
        elif self._draining.ending:
            refusal = _refusal()
            self._answers.refuse(refusal)
            await refusal.response()(scope, receive, send)
        else:
            self._draining.num_running += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._draining.num_running -= 1


def _refusal() -> ApiError:
    return ApiError(
        503,
        "The server is about to stop; try again, there or on another one.",
        "service_unavailable",
        code="server_stopping",
        retry_after_s=RETRY_AFTER_S,
    )
