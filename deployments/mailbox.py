"""Tokens on their way to a reader, merged while the reader is behind."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from deployments.wire import merge_delta
from engine.outputs import TokenDelta


class Mailbox:
    """At most one pending delta a request, so that memory is bounded by what was asked for.

    Belongs to one event loop; every method is to be called there.
    """

    def __init__(self) -> None:
        self._pending: dict[str, TokenDelta] = {}
        self._error: BaseException | None = None
        self._ready = asyncio.Event()

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, deltas: Iterable[TokenDelta]) -> None:
        """Deliver deltas; those of a request that is already pending are merged into one."""
        for delta in deltas:
            known = self._pending.setdefault(delta.request_id, delta)
            if known is not delta:
                merge_delta(known, delta)
        self._ready.set()

    def fail(self, error: BaseException) -> None:
        """Let the reader have what is pending, and then raise `error`."""
        self._error = self._error or error
        self._ready.set()

    def wake(self) -> None:
        """Let the reader return even though nothing is pending."""
        self._ready.set()

    def discard(self, request_id: str) -> None:
        """Forget what is pending of a request."""
        self._pending.pop(request_id, None)

    async def take(self) -> list[TokenDelta]:
        """Wait for deltas (or for `wake`) and take all of them.

        Raises:
            BaseException: the one given to `fail`, once nothing is pending.
        """
        await self._ready.wait()
        self._ready.clear()
        pending, self._pending = list(self._pending.values()), {}
        if self._error is not None:
            self._ready.set()
            if not pending:
                raise self._error
        return pending
