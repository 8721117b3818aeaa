"""What an ingress sends to engines: requests, and aborts of them.

A request goes from here to the engine where it was booked, beside Serve's call to the replica,
which counts it. By way of the replica it would take two calls, one after the other, before it could
begin.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Container
from contextvars import Context

import msgspec

from deployments.engine_link import EngineLink
from deployments.wire import encode

logger = logging.getLogger("ray.serve")

ABORT_LIMIT_S = 1.0
"""A request that still runs so long after its abort is aborted again."""
ABORTED_KEPT = 4096
"""So many aborts are remembered."""


class Dispatch:
    """Sends what begins or ends in one turn of the event loop, to which it belongs, in few calls.

    They are made in a context of their own: Ray takes one for a child of the request in whose
    context it is made, and cancels it with that request.

    Args:
        wanted: ids of the requests that somebody waits for.
        on_refusal: called with an engine and the requests that it did not take.
    """

    def __init__(
        self, wanted: Container[str], on_refusal: Callable[[str, Collection[str]], None]
    ) -> None:
        self.links: dict[str, EngineLink] = {}
        """To the engines whose trunks are open."""
        self._wanted = wanted
        self._on_refusal = on_refusal
        self._submissions: dict[str, dict[str, bytes]] = {}
        """Encoded ones by engine and request id, to be sent."""
        self._following: set[asyncio.Task[None]] = set()
        self._not_taken: Collection[str] = ()
        """Requests that an engine has just refused to take."""
        self._aborts: dict[str, list[str]] = {}
        """Request ids by engine, to be sent."""
        self._aborted: OrderedDict[tuple[str, str], float] = OrderedDict()
        """When engines were last told to end which requests."""
        self._loop = asyncio.get_running_loop()

    def open(self, engine_id: str, link: EngineLink) -> None:
        """Send to an engine from now on, first what has waited for this."""
        if engine_id not in self.links:
            self.links[engine_id] = link
            self._send_submissions(engine_id)

    def close(self, engine_id: str) -> bool:
        """Send nothing more to an engine, nor what waits; returns whether it was open."""
        self._submissions.pop(engine_id, None)
        return self.links.pop(engine_id, None) is not None

    def submit(self, request_id: str, submission: bytes, engine_id: str) -> None:
        """Send a request to its engine, once that is open; called in any thread."""
        if _running_loop() is self._loop:
            self._post(request_id, submission, engine_id)
        else:
            self._loop.call_soon_threadsafe(self._post, request_id, submission, engine_id)

    def _post(self, request_id: str, submission: bytes, engine_id: str) -> None:
        """Send at once what is the first in this turn; it may have come alone."""
        if engine_id not in self.links and request_id not in self._wanted:
            return  # it went on elsewhere, or has ended, while the router's thread told of it
        first = engine_id not in self._submissions
        self._submissions.setdefault(engine_id, {})[request_id] = submission
        if first and engine_id in self.links:
            self._send_submissions(engine_id)
            self._submissions[engine_id] = {}  # for those that come after it
            self._loop.call_soon(self._send_submissions, engine_id)

    def _send_submissions(self, engine_id: str) -> None:
        if engine_id not in self.links:
            return
        if batch := self._submissions.pop(engine_id, {}):
            task = self._loop.create_task(
                self._follow(engine_id, batch, self._hand_over(engine_id, batch)),
                context=Context(),
            )
            self._following.add(task)  # the event loop itself would not keep it
            task.add_done_callback(self._following.discard)

    def _hand_over(self, engine_id: str, batch: dict[str, bytes]) -> Awaitable[None]:
        try:
            data = encode([msgspec.Raw(each) for each in batch.values()])
            return Context().run(self.links[engine_id].submit, data)
        except Exception as error:  # such as a store without room for what is large
            failed: asyncio.Future[None] = self._loop.create_future()
            failed.set_exception(error)
            return failed

    async def _follow(
        self, engine_id: str, request_ids: Collection[str], taken: Awaitable[None]
    ) -> None:
        try:
            await taken
        except Exception as error:  # those who wait would not hear of it otherwise
            reason, number = summary(error), len(request_ids)
            logger.error("engine %s did not take %d requests (%s)", engine_id, number, reason)
            self._not_taken = request_ids
            try:
                self._on_refusal(engine_id, request_ids)
            finally:
                self._not_taken = ()

    def abort(self, engine_id: str, request_id: str) -> bool:
        """Tell an engine to end a request; returns at once.

        Returns:
            Whether the engine will hear of it; else it does not have the request, or cannot be
            reached.
        """
        waiting = self._submissions.get(engine_id, {}).pop(request_id, None)
        unknown = waiting is not None or request_id in self._not_taken
        if unknown or engine_id not in self.links:
            return False
        if not self._aborts:
            self._loop.call_soon(self._send_aborts, context=Context())
        self._aborts.setdefault(engine_id, []).append(request_id)
        self._aborted[engine_id, request_id] = self._loop.time()
        if len(self._aborted) > ABORTED_KEPT:
            self._aborted.popitem(last=False)
        return True

    def abort_again(self, engine_id: str, request_id: str) -> None:
        """Tell an engine that runs a request for nobody, unless it has just been told."""
        told = self._aborted.get((engine_id, request_id))
        if told is None or self._loop.time() - told > ABORT_LIMIT_S:
            self._aborted.pop((engine_id, request_id), None)
            self.abort(engine_id, request_id)

    def _send_aborts(self) -> None:
        aborts, self._aborts = self._aborts, {}
        for engine_id, request_ids in aborts.items():
            if engine_id in self.links:
                self.links[engine_id].abort(request_ids)


def summary(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
