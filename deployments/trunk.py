"""The ingress's end of the trunks: one reader an engine, sorting deltas to waiting requests."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Protocol

import ray
from ray.exceptions import ObjectRefStreamEndOfStreamError

from deployments.load_table import LoadTable
from deployments.mailbox import Mailbox
from deployments.names import SERVE_NAMESPACE, engine_actor_name
from deployments.wire import TrunkMessage, decode_trunk_message
from engine.errors import EngineDead

logger = logging.getLogger("ray.serve")

ACKNOWLEDGED_MESSAGES = 8
"""So many messages are acknowledged at once; the engine sends `UNREAD_MESSAGES` ahead, then it
merges steps."""
ACKNOWLEDGED_S = 1.0
"""Fewer are after this long, so that the engine knows that this process lives."""
RECONNECT_DELAY_S = 0.5
"""Pause before a trunk that broke is read anew."""


class EngineLink(Protocol):
    """The calls that an ingress makes to an engine actor."""

    def subscribe(self, subscriber_id: str) -> AsyncIterator[bytes]:
        """Read this subscriber's trunk."""

    def acknowledge(self, subscriber_id: str, count: int) -> None:
        """Tell that so many more messages have been read; returns at once."""

    def abort(self, request_ids: list[str]) -> None:
        """Ask for the end of requests; returns at once."""


class RayEngineLink:
    """The engine actor of a Serve replica, found by name."""

    def __init__(self, engine_id: str) -> None:
        self._actor = ray.get_actor(engine_actor_name(engine_id), namespace=SERVE_NAMESPACE)

    async def subscribe(self, subscriber_id: str) -> AsyncIterator[bytes]:
        """Read this subscriber's trunk until it ends or, with a RayError, breaks."""
        messages = self._actor.subscribe.options(num_returns="streaming").remote(subscriber_id)
        try:
            while True:
                # As `async for` does, but that waits for each object twice.
                (ref,) = messages._get_next_ref_n(1)
                try:
                    message = await ref
                except ObjectRefStreamEndOfStreamError:
                    return
                messages._consume_next_ref_n(1)
                yield message
        finally:
            ray.cancel(messages)

    def acknowledge(self, subscriber_id: str, count: int) -> None:
        """Tell that so many more messages have been read; returns at once."""
        self._actor.acknowledge.remote(subscriber_id, count)

    def abort(self, request_ids: list[str]) -> None:
        """Ask for the end of requests; returns at once."""
        self._actor.abort.remote(request_ids)


class TrunkHub:
    """Keeps a trunk open to every engine in service. Belongs to one event loop.

    Args:
        subscriber_id: names this process to the engines.
        table: gets the load that the trunks carry, and says which engines there are.
        connect: makes the link to an engine; may block, so it is called in a thread.
    """

    def __init__(
        self,
        subscriber_id: str,
        table: LoadTable,
        connect: Callable[[str], EngineLink] = RayEngineLink,
    ) -> None:
        self.subscriber_id = subscriber_id
        self._table = table
        self._connect = connect
        self._links: dict[str, EngineLink] = {}
        self._readers: dict[str, asyncio.Task[None]] = {}
        self._mailboxes: dict[str, Mailbox] = {}
        self._deployments: list[str] = []
        self._loop = asyncio.get_running_loop()
        table.on_change(self._on_change)

    def follow(self, deployment: str) -> None:
        """Read the trunks of all engines of this deployment from now on."""
        self._deployments.append(deployment)
        self._follow_members()

    def register(self, request_id: str, mailbox: Mailbox) -> None:
        """Deliver the deltas of this request to `mailbox` from now on."""
        self._mailboxes[request_id] = mailbox

    def unregister(self, request_id: str) -> None:
        """Drop later deltas of this request."""
        self._mailboxes.pop(request_id, None)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Tell the engines that run these requests to end them; returns at once."""
        by_engine: dict[str, list[str]] = {}
        for request_id in request_ids:
            engine_id = self._table.engine_of(request_id)
            if engine_id is not None:
                by_engine.setdefault(engine_id, []).append(request_id)
        for engine_id, ids in by_engine.items():
            if engine_id in self._links:
                self._links[engine_id].abort(ids)

    def connected(self, deployment: str) -> list[str]:
        """Engines of the deployment that are in service and whose trunk is open."""
        return [i for i in self._table.members(deployment) if i in self._links]

    def _on_change(self) -> None:
        self._loop.call_soon_threadsafe(self._follow_members)

    def _follow_members(self) -> None:
        wanted = {i for name in self._deployments for i in self._table.members(name)}
        for engine_id in wanted - self._readers.keys():
            self._readers[engine_id] = self._loop.create_task(self._keep_reading(engine_id))

    def _in_service(self, engine_id: str) -> bool:
        return any(engine_id in self._table.members(name) for name in self._deployments)

    async def _keep_reading(self, engine_id: str) -> None:
        """Read an engine's trunk, again if it broke, until the engine is out of service."""
        try:
            while True:
                error = await self._read(engine_id)
                self._lose(engine_id, error)
                if not self._in_service(engine_id):
                    break
                await asyncio.sleep(RECONNECT_DELAY_S)
        finally:
            del self._readers[engine_id]
            self._table.forget(engine_id)

    async def _read(self, engine_id: str) -> str:
        """Read a trunk to its end and say why it ended."""
        try:
            link = await asyncio.to_thread(self._connect, engine_id)
            unacknowledged, since = 0, time.monotonic()
            async for message in link.subscribe(self.subscriber_id):
                self._links[engine_id] = link
                self._deliver(engine_id, decode_trunk_message(message))
                unacknowledged += 1
                waited = time.monotonic() - since
                if unacknowledged >= ACKNOWLEDGED_MESSAGES or waited > ACKNOWLEDGED_S:
                    link.acknowledge(self.subscriber_id, unacknowledged)
                    unacknowledged, since = 0, time.monotonic()
            return "it shut down"
        except Exception as error:  # a reader that ended unseen would leave clients hanging
            return f"{type(error).__name__}: {error}".splitlines()[0]

    def _deliver(self, engine_id: str, message: TrunkMessage) -> None:
        self._table.report(engine_id, message.load, message.reflected, message.heard)
        for delta in message.deltas:
            mailbox = self._mailboxes.get(delta.request_id)
            if mailbox is not None:
                mailbox.add(delta)

    def _lose(self, engine_id: str, reason: str) -> None:
        """Fail what the lost engine left unfinished."""
        if self._links.pop(engine_id, None) is None:
            return
        unfinished = self._table.mark_down(engine_id)
        log = logger.error if unfinished else logger.info
        log("trunk to engine %s ended (%s); %d requests lost", engine_id, reason, len(unfinished))
        for request_id in unfinished:
            mailbox = self._mailboxes.get(request_id)
            if mailbox is not None:
                mailbox.fail(EngineDead("the engine that ran the request was lost; try again."))
