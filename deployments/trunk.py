"""The ingress's end of the trunks: one reader an engine, sorting deltas to waiting requests."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Protocol

from deployments import watchdog
from deployments.dispatch import Dispatch, summary
from deployments.engine_link import EngineLink, RayEngineLink
from deployments.load_table import LoadTable
from deployments.wire import TrunkMessage, decode_trunk_message
from engine.outputs import TokenDelta

logger = logging.getLogger("ray.serve")

ACKNOWLEDGED_MESSAGES = 8
"""So many messages are acknowledged at once; the engine sends `UNREAD_MESSAGES` ahead, then it
merges steps."""
ACKNOWLEDGED_S = 1.0
"""Fewer are after this long, so that the engine knows that this process lives."""
SILENCE_LIMIT_S = watchdog.SILENCE_LIMIT_S
"""An engine tells its load every second. One that has not for this long is taken for lost: its
process hangs, or is stopped, or its node cannot be reached."""
RECONNECT_DELAY_S = 0.5
"""Pause before a trunk that broke is read anew."""
ASK_INTERVAL_S = 0.1
"""Engines are asked whether they live no more often than this."""


class Receiver(Protocol):
    """Who waits for the deltas of a request."""

    @property
    def deployment(self) -> str:
        """Whose engines run the request."""

    def add(self, delta: TokenDelta, engine_id: str) -> None:
        """Take a delta that an engine sent."""

    def lose(self) -> None:
        """Learn that the request's engine is lost."""

    def make_way(self) -> bool:
        """Learn that the request's engine is to stop; True if it goes on elsewhere."""

    def strand(self) -> None:
        """Learn that no engine can be reached: none of the deployment, nor the request's own."""

    def fail(self, error: Exception) -> None:
        """End the request: this was raised by one of the other methods."""


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
        self._receivers: dict[str, Receiver] = {}
        self._dispatch = Dispatch(self._receivers, self._on_refusal)
        self._readers: dict[str, asyncio.Task[None]] = {}
        self._deployments: list[str] = []
        self._loop = asyncio.get_running_loop()
        self._asked = 0.0
        """When engines were last asked whether they live."""
        table.on_change(self._on_change)
        table.on_doubt(self._on_doubt)

    def follow(self, deployment: str) -> None:
        """Read the trunks of all engines of this deployment from now on."""
        self._deployments.append(deployment)
        self._follow_members()

    def register(self, request_id: str, receiver: Receiver) -> None:
        """Tell `receiver` what comes of this request from now on."""
        self._receivers[request_id] = receiver

    def unregister(self, request_id: str) -> None:
        """Drop later deltas of this request."""
        self._receivers.pop(request_id, None)

    def submit(self, request_id: str, submission: bytes, engine_id: str) -> None:
        """Send a request to its engine, once the trunk there is open; called in any thread."""
        self._dispatch.submit(request_id, submission, engine_id)

    def _on_refusal(self, engine_id: str, request_ids: Iterable[str]) -> None:
        self._table.mark_down(engine_id)
        self._move(request_ids)

    def _move(self, request_ids: Iterable[str]) -> None:
        """Let requests go on elsewhere."""
        for request_id in request_ids:
            if (receiver := self._receivers.get(request_id)) is not None:
                self._tell(request_id, receiver, receiver.lose)

    def make_way(self, request_id: str) -> bool:
        """Let a request go on elsewhere; False if it cannot."""
        receiver = self._receivers.get(request_id)
        return receiver is not None and self._tell(request_id, receiver, receiver.make_way)

    def _tell(self, request_id: str, receiver: Receiver, news: Callable[[], bool | None]) -> bool:
        """Call a method of a receiver, and end the request if that raises: others wait to hear, and
        the tasks that tell them must go on."""
        try:
            return bool(news())
        except Exception as error:
            self._give_up(request_id, receiver, error)
            return False

    def _give_up(self, request_id: str, receiver: Receiver, error: Exception) -> None:
        logger.error("request %s is given up", request_id, exc_info=error)
        with contextlib.suppress(Exception):  # the client hears of it first
            receiver.fail(error)

    def abort(self, request_id: str) -> bool:
        """Tell the engine that runs a request to end it; returns at once.

        Returns:
            Whether there is such an engine that will hear of it.
        """
        engine_id = self._table.engine_of(request_id)
        return engine_id is not None and self._dispatch.abort(engine_id, request_id)

    def connected(self, deployment: str) -> list[str]:
        """Engines of the deployment that are in service and whose trunk is open."""
        return [i for i in self._table.members(deployment) if i in self._dispatch.links]

    def reaches(self, request_id: str) -> bool:
        """Whether the trunk to the request's engine is open, which may be out of service."""
        return self._table.engine_of(request_id) in self._dispatch.links

    def _on_change(self) -> None:
        self._loop.call_soon_threadsafe(self._follow_members)

    def _on_doubt(self) -> None:
        self._loop.call_soon_threadsafe(self._ask)

    def _ask(self) -> None:
        """Have every engine show that it lives: an idle one would say nothing for a second."""
        now = self._loop.time()
        if now - self._asked >= ASK_INTERVAL_S:
            self._asked = now
            for link in self._dispatch.links.values():
                link.acknowledge(self.subscriber_id, 0)

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
            await self._take_messages(engine_id, link)
            return "it shut down"
        except TimeoutError:
            return f"it has said nothing for {SILENCE_LIMIT_S:.0f} s"
        except Exception as error:  # a reader that ended unseen would leave clients hanging
            return summary(error)

    async def _take_messages(self, engine_id: str, link: EngineLink) -> None:
        """Deliver and acknowledge until the end; TimeoutError when the engine falls silent."""
        unacknowledged, since = 0, self._loop.time()
        async with _silence_limit() as silence:
            async for message in link.subscribe(self.subscriber_id):
                now = self._loop.time()
                silence.end()
                self._dispatch.open(engine_id, link)
                self._deliver(engine_id, decode_trunk_message(message))
                unacknowledged += 1
                if unacknowledged >= ACKNOWLEDGED_MESSAGES or now - since > ACKNOWLEDGED_S:
                    link.acknowledge(self.subscriber_id, unacknowledged)
                    unacknowledged, since = 0, now

    def _deliver(self, engine_id: str, message: TrunkMessage) -> None:
        self._table.report(engine_id, message.load, message.reflected, message.heard)
        for delta in message.deltas:
            receiver = self._receivers.get(delta.request_id)
            if receiver is not None:
                try:
                    receiver.add(delta, engine_id)
                except Exception as error:  # not by `_tell`: this is done for every token
                    self._give_up(delta.request_id, receiver, error)
            elif delta.finish_reason is None:
                self._dispatch.abort_again(engine_id, delta.request_id)

    def _lose(self, engine_id: str, reason: str) -> None:
        """Let others go on with what the lost engine left unfinished."""
        known = self._dispatch.close(engine_id)
        unfinished = self._table.mark_down(engine_id)
        if not known and not unfinished:
            return
        log = logger.error if unfinished else logger.info
        log("trunk to engine %s ended (%s); %d requests move", engine_id, reason, len(unfinished))
        self._move(unfinished)
        for request_id, receiver in list(self._receivers.items()):
            if not (self.connected(receiver.deployment) or self.reaches(request_id)):
                self._tell(request_id, receiver, receiver.strand)


@contextlib.asynccontextmanager
async def _silence_limit() -> AsyncIterator[watchdog.Silence]:
    """End the block by a TimeoutError when the engine has been silent for too long.

    Not by a plain timeout: after this process itself has stood still, that would end before what
    has come meanwhile is read, for all engines at once.
    """
    silence = watchdog.Silence()

    async def look() -> None:
        while (left := SILENCE_LIMIT_S - silence.look()) > 0:
            await asyncio.sleep(min(watchdog.LOOK_S, left))
        limit.reschedule(asyncio.get_running_loop().time())

    async with asyncio.timeout(None) as limit:
        watch = asyncio.create_task(look())
        try:
            yield silence
        finally:
            watch.cancel()
