"""Tokens on their way to a reader, merged while the reader is behind."""

from __future__ import annotations

import asyncio

from deployments.wire import merge_delta
from engine.outputs import TokenDelta


class Mailbox:
    """At most one pending delta a request, so that memory is bounded by what was asked for.

    Belongs to one event loop; every method is to be called there.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()  # to ask anew would be a system call a token
        self._pending: dict[str, TokenDelta] = {}
        self._error: BaseException | None = None
        self._woken = False
        self._reader: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, delta: TokenDelta) -> None:
        """Deliver a delta; it is merged with what is already pending of its request."""
        known = self._pending.setdefault(delta.request_id, delta)
        if known is not delta:
            merge_delta(known, delta)
        self.wake()

    def fail(self, error: BaseException) -> None:
        """Let the reader have what is pending, and then raise `error`."""
        self._error = self._error or error
        self.wake()

    def wake(self) -> None:
        """Let the reader return even though nothing is pending."""
        self._woken = True
        reader, self._reader = self._reader, None
        if reader is not None and not reader.done():  # it may have been cancelled
            reader.set_result(None)

    async def take(self) -> list[TokenDelta]:
        """Wait for deltas (or for `wake`) and take all of them.

        Raises:
            BaseException: the one given to `fail`, once nothing is pending.
        """
        if not self._woken:
            self._reader = self._loop.create_future()
            await self._reader
        pending, self._pending = list(self._pending.values()), {}
        self._woken = self._error is not None
        if self._error is not None and not pending:
            raise self._error
        return pending
