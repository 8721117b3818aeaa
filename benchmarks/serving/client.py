"""A streaming HTTP client that costs little: it notes what bytes came when, and reads them later.

General clients, and asyncio's own transports, spend more on a token than a good server does; on a
small machine they would take the CPU away from what is measured. So one thread does nothing but
receive, and an event loop is only told of the ends of answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import threading
import time
from dataclasses import dataclass, field

_LAST_CHUNK = b"0\r\n\r\n"
"""End of a chunked body without trailers (RFC 9112, 7.1)."""
LOST = "the connection was lost"
_RECEIVE_BYTES = 65536
_LOOK_AROUND_S = 0.1
"""How often an idle receiver looks whether it should end."""


@dataclass(slots=True)
class Exchange:
    """A request and the answer's bytes, each piece with the `time.monotonic()` of its arrival."""

    sent: float
    status: int = 0
    retry_after: str | None = None
    """The header of that name."""
    chunked: bool = False
    # Not shown: asyncio.run makes a text of its result, to compare signal handlers.
    pieces: list[tuple[float, bytes]] = field(default_factory=list, repr=False)
    """Of the body, as it was transferred."""
    error: str | None = None
    """What kept the answer from being complete."""
    port: int = 0
    """The client's, by which a proxy's log knows the connection."""


class Receiver:
    """Receives for all connections, in a thread of its own, as long as it is entered."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._connections: dict[int, Connection] = {}
        self._thread = threading.Thread(target=self._run, name="receiver", daemon=True)
        self._ended = False

    def __enter__(self) -> Receiver:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._thread.join()
        for connection in self._connections.values():
            connection.socket.close()
        self._epoll.close()

    def add(self, connection: Connection) -> None:
        """Receive what comes there from now on, until it is lost."""
        self._connections[connection.socket.fileno()] = connection
        self._epoll.register(connection.socket.fileno(), select.EPOLLIN)

    def _run(self) -> None:
        while not self._ended:
            for number, _ in self._epoll.poll(_LOOK_AROUND_S):
                connection = self._connections[number]
                if not connection.receive():
                    self._epoll.unregister(number)
                    del self._connections[number]
                    connection.socket.close()


class Connection:
    """A connection that is kept, with one exchange at a time. Belongs to one event loop."""

    def __init__(self) -> None:
        self.socket = socket.socket()
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.port = 0
        """Of this side, once connected."""
        self.lost = False
        """Whether no exchange can begin any more."""
        self._exchange = Exchange(0.0)
        self._head = b""
        self._missing: int | None = None
        """Bytes of the body still to come; None when it is chunked, -1 before the head is there."""
        self._done: asyncio.Future[None] | None = None

    @classmethod
    async def open(cls, receiver: Receiver, host: str, port: int) -> Connection:
        """Connect.

        Raises:
            OSError: nobody answers there.
        """
        connection = cls()
        try:
            await asyncio.get_running_loop().sock_connect(connection.socket, (host, port))
        except OSError:
            connection.socket.close()
            raise
        connection.port = connection.socket.getsockname()[1]
        receiver.add(connection)
        return connection

    async def exchange(self, request: bytes, timeout_s: float) -> Exchange:
        """Send a request and wait for the end of its answer; failures are told in the result."""
        exchange = self._exchange = Exchange(time.monotonic(), port=self.port)
        self._head, self._missing = b"", -1
        done = self._done = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout_s):
                if self.lost:  # before there was anybody to tell
                    raise ConnectionError(LOST)
                await self._send(request, done)
                await done
        except TimeoutError:
            exchange.error = f"no end of the answer within {timeout_s:g} s"
        except OSError as error:
            exchange.error = str(error)
        if exchange.error:
            self.close()
        return exchange

    async def _send(self, request: bytes, done: asyncio.Future[None]) -> None:
        """Send a request, as far as the server takes it before its answer ends.

        A server may refuse a long request and close before it has read all of it. So a failure
        tells nothing: whether an answer came does, and the receiver sees the end of that.
        """
        try:
            sent = self.socket.send(request)  # all of it, nearly always
        except BlockingIOError:
            sent = 0
        except OSError:
            return
        if sent < len(request):
            rest = asyncio.get_running_loop().sock_sendall(self.socket, request[sent:])
            sending = asyncio.ensure_future(rest)
            await asyncio.wait((sending, done), return_when=asyncio.FIRST_COMPLETED)
            if not sending.cancel():
                sending.exception()  # looked at, so that nobody logs it

    def close(self) -> None:
        """End the connection; the receiver lets go of it."""
        if not self.lost:
            self.lost = True
            with contextlib.suppress(OSError):  # the other side was faster
                self.socket.shutdown(socket.SHUT_RDWR)

    def receive(self) -> bool:
        """Take what has come; False when the connection is lost. Called by the receiver."""
        try:
            data = self.socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        try:
            if data:
                self._take(time.monotonic(), data)
                return True
            error = LOST
        except (IndexError, ValueError):
            error = f"not an answer in HTTP/1.1: {self._head[:80]!r}"
        self.lost = True
        self._end(error)
        return False

    def _take(self, now: float, data: bytes) -> None:
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
        if ended:
            self._end(None)

    def _end(self, error: str | None) -> None:
        """Wake whoever waits for the answer."""
        done, self._done = self._done, None
        if done is not None:
            done.get_loop().call_soon_threadsafe(_resolve, done, error)

    def _read_head(self, head: bytes) -> int | None:
        """Note the status; returns the body's length, or None when it is chunked."""
        status, *lines = head.decode("latin-1").split("\r\n")
        self._exchange.status = int(status.split(" ")[1])
        pairs = (line.partition(":") for line in lines)
        values = {name.lower(): value.strip() for name, _, value in pairs}
        self._exchange.retry_after = values.get("retry-after")
        self._exchange.chunked = values.get("transfer-encoding", "").lower() == "chunked"
        return None if self._exchange.chunked else int(values.get("content-length", 0))


def _resolve(done: asyncio.Future[None], error: str | None) -> None:
    if done.done():  # it has timed out
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(ConnectionError(error))
