"""Takes in request bodies: none too long, none too slow, and not too many at once."""

from __future__ import annotations

import asyncio

from starlette.types import Receive, Scope

from deployments.ingress.errors import ApiError, overloaded

AT_ONCE = 64
"""As many bodies of the greatest length may be in memory; shorter ones may be more."""


class Bodies:
    """The request bodies that this process holds.

    Args:
        max_bytes: of one.
        timeout_s: within which one must have come.
    """

    def __init__(self, max_bytes: int, timeout_s: float) -> None:
        self.held = 0
        """Bytes of all that are being read or answered."""
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body of a request, or None when the client left before its end.

        It counts as held until it is given to `release`.

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

    def release(self, body: bytes) -> None:
        """Count a body no longer."""
        self.held -= len(body)

    async def _read(self, receive: Receive) -> bytes | None:
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
                if self.held > AT_ONCE * self._max_bytes:
                    raise overloaded(1)
                more = message.get("more_body", False)
            body = b"".join(chunks)
        finally:
            if body is None:
                self.held -= size
        return body


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
