"""A streaming HTTP client that costs little: it notes what bytes came when, and reads them later.

General clients spend more on a token than the server that is to be measured; on a small machine
they would take the CPU away from it.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

_LAST_CHUNK = b"0\r\n\r\n"
"""End of a chunked body without trailers (RFC 9112, 7.1)."""


@dataclass(slots=True)
class Exchange:
    """A request and the answer's bytes, each piece with the `time.monotonic()` of its arrival."""

    sent: float
    status: int = 0
    chunked: bool = False
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    """Of the body, as it was transferred."""
    error: str | None = None
    """What kept the answer from being complete."""


class Connection(asyncio.Protocol):
    """A connection that is kept, with one exchange at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._exchange = Exchange(0.0)
        self._head = b""
        self._missing: int | None = None
        """Bytes of the body still to come; None when it is chunked, -1 before the head is there."""
        self._done: asyncio.Future[None] | None = None

    @classmethod
    async def open(cls, host: str, port: int) -> Connection:
        """Connect.

        Raises:
            OSError: nobody answers there.
        """
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(cls, host, port)
        return connection

    @property
    def usable(self) -> bool:
        """Whether another exchange can begin."""
        return self._transport is not None and not self._transport.is_closing()

    async def exchange(self, request: bytes, timeout_s: float) -> Exchange:
        """Send a request and wait for the end of its answer; failures are told in the result."""
        assert self._transport is not None
        exchange = self._exchange = Exchange(time.monotonic())
        self._head, self._missing = b"", -1
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            async with asyncio.timeout(timeout_s):
                await self._done
        except TimeoutError:
            exchange.error = f"no end of the answer within {timeout_s:g} s"
        except ConnectionError as error:
            exchange.error = str(error)
        finally:
            self._done = None
        if exchange.error:
            self.close()
        return exchange

    def close(self) -> None:
        """End the connection."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        """Called by the event loop."""
        self._transport = None
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionError(f"the connection was lost: {error}"))

    def data_received(self, data: bytes) -> None:
        """Called by the event loop with whatever has arrived."""
        now = time.monotonic()
        if self._missing == -1:
            self._head += data
            head, found, data = self._head.partition(b"\r\n\r\n")
            if not found:
                return
            self._missing = self._read_head(head)
        pieces = self._exchange.pieces
        pieces.append((now, data))
        if self._missing is None:
            ended = data.endswith(_LAST_CHUNK) or (
                len(data) < len(_LAST_CHUNK)
                and b"".join(piece for _, piece in pieces[-5:]).endswith(_LAST_CHUNK)
            )
        else:
            self._missing = max(self._missing - len(data), 0)
            ended = self._missing == 0
        if ended and self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _read_head(self, head: bytes) -> int | None:
        """Note the status; returns the body's length, or None when it is chunked."""
        status, *fields = head.decode("latin-1").split("\r\n")
        self._exchange.status = int(status.split(" ")[1])
        values = {
            name.lower(): value.strip() for name, _, value in (f.partition(":") for f in fields)
        }
        self._exchange.chunked = values.get("transfer-encoding", "").lower() == "chunked"
        return None if self._exchange.chunked else int(values.get("content-length", 0))
