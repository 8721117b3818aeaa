"""Takes in request bodies: none too long, none too slow, and not too many at once."""

from __future__ import annotations

import asyncio

from starlette.types import Receive, Scope

from deployments.ingress.errors import ApiError, overloaded


class Bodies:
    """The request bodies that this process holds.

    Args:
        max_bytes: of one.
        max_bytes_together: of all that are being read or handled.
        timeout_s: within which one must have come.
    """

    def __init__(self, max_bytes: int, max_bytes_together: int, timeout_s: float) -> None:
        self.held = 0
        """Bytes of all that are being read or handled."""
        self._max_bytes = max_bytes
        self._max_bytes_together = max_bytes_together
        self._timeout_s = timeout_s

    async def read(self, scope: Scope, receive: Receive) -> HeldBody | None:
        """The body of a request, or None when the client left before its end.

        Raises:
            ApiError: 413, it is too long; 408, it is too slow; 429, others fill the memory.
        """
        _check_announced_length(scope, self._max_bytes)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._read(receive)
        except TimeoutError:
            raise ApiError(
                408,
                f"The request body did not come within {self._timeout_s:g} s; send it faster, or "
                "less.",
                "invalid_request_error",
                code="body_too_slow",
            ) from None

    async def _read(self, receive: Receive) -> HeldBody | None:
        chunks: list[bytes] = []
        size, more, body = 0, True, None
        try:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                chunks.append(message.get("body", b""))
                size += len(chunks[-1])
                self.held += len(chunks[-1])
                if size > self._max_bytes:
                    raise _too_large(self._max_bytes)
                if self.held > self._max_bytes_together:
                    raise overloaded(1, "bodies")
                more = message.get("more_body", False)
            body = HeldBody(self, b"".join(chunks))
        finally:
            if body is None:
                self.held -= size
        return body


class HeldBody:
    """A body that has come, and counts as held until it is released.

    Args:
        bodies: where it counts.
        data: the body.
    """

    __slots__ = ("_bodies", "data")

    def __init__(self, bodies: Bodies, data: bytes) -> None:
        self.data = data
        self._bodies = bodies

    def release(self) -> None:
        """Let go of the body; once more does nothing."""
        self._bodies.held -= len(self.data)
        self.data = b""


def _check_announced_length(scope: Scope, limit: int) -> None:
    """Refuse a body that says of itself that it is too long, before any of it is read.

    Lengths that are no numbers have been refused by the HTTP server.
    """
    for name, value in scope["headers"]:
        if name == b"content-length" and (len(value) > 18 or int(value) > limit):
            raise _too_large(limit)


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"The request body is longer than {limit} bytes; send less.",
        "invalid_request_error",
        code="body_too_large",
    )
