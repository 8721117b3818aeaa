"""The engine actor: owns the engine and its loop, and feeds the trunks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from typing import Any, Protocol

from deployments.engine_guard import EngineGuard
from deployments.load_meter import LoadMeter
from deployments.metrics import lag_gauge
from deployments.observability.logs import ProcessLog, configure_logging
from deployments.request_ends import RequestEnds
from deployments.subscriber import Subscriber
from deployments.watchdog import LoopLag, WatchOptions
from deployments.wire import (
    EndNotice,
    EngineReport,
    Submission,
    TrunkMessage,
    decode_submissions,
    encode,
)
from engine.config import EngineConfig
from engine.errors import EngineDead
from engine.loop import Core, EngineLoop
from engine.outputs import EngineLoad, TokenDelta

logger = logging.getLogger("trunkline.actor")

HEARTBEAT_S = 1.0
"""An idle trunk carries the load this often."""
LOAD_INTERVAL_S = 0.1
"""A trunk without new tokens carries the load of a busy engine no more often than this."""
IDLE_INTERVAL_S = 0.01
"""And that of an idle one no more often than this: requests of a step or two that come one by one
leave an engine idle hundreds of times a second, which costs a message for every trunk."""
REPORT_INTERVAL_S = 0.05
"""The replica is told of ends no more often than this: a report costs far more than an end does,
and clients learn of ends from the trunk."""
UNREAD_LIMIT_S = 10.0
"""Requests of a subscriber that has neither subscribed nor acknowledged for this long are aborted.
That is how the end of a killed ingress is noticed."""
EARLY_ABORTS_S = 60.0
"""An abort that came before its request is remembered this long; Ray keeps no order between calls
of an async actor, and brings large ones later."""
EARLY_ABORTS = 4096
"""And no more of them are than this."""


class StartedCore(Core, Protocol):
    """A core that says what it settled on at start."""

    @property
    def info(self) -> Any:
        """An `EngineInfo`."""


StartCore = Callable[[EngineConfig], StartedCore]


def post(events: asyncio.AbstractEventLoop, function: Callable[..., None], *args: Any) -> None:
    """Call `function` in the event loop, from any thread; a loop that is closing is no error."""
    with contextlib.suppress(RuntimeError):
        events.call_soon_threadsafe(function, *args)


class EngineActor:
    """Async Ray actor. Its loop thread only ever hands a step's deltas to the event loop.

    When the loop dies or a step hangs, it says so on the trunks and to its replica, leaves a crash
    dump, and ends its process.

    Args:
        config: of the engine.
        start_core: makes its core.
        options: of the watchdogs.
        log: how this process logs; None leaves that as it is.
    """

    def __init__(
        self,
        config: EngineConfig,
        start_core: StartCore,
        options: WatchOptions = WatchOptions(),  # noqa: B008  # it is frozen
        log: ProcessLog | None = None,
    ) -> None:
        if log is not None:
            configure_logging(log)
        self._model_name = log.place.model if log else None
        self._ends = RequestEnds(log.options.requests if log else False)
        self._config = config
        self._start_core = start_core
        self._options = options
        self._subscribers: dict[str, Subscriber] = {}
        self._owners: dict[str, str] = {}
        self._num_tokens: dict[str, int] = {}
        self._num_submitted = 0
        self._early_aborts: OrderedDict[str, float] = OrderedDict()
        self._load = EngineLoad()
        self._load_since = 0.0
        self._meter = LoadMeter(config.max_num_seqs)
        self._telling: asyncio.TimerHandle | None = None
        self._report = EngineReport([], self._load)
        self._report_ready = asyncio.Event()
        self._readers = 0
        self._draining = False
        self._lag = LoopLag("an engine actor", lag_gauge("engine_actor"), logger)

    def __repr__(self) -> str:
        """As Ray's dashboard shows it."""
        return f"EngineActor({self._model_name or self._config.model})"

    async def start(self) -> dict[str, Any]:
        """Load the model and start the loop; returns the fields of EngineInfo, and the `pid`.

        Raises:
            ConfigError: the model or an option cannot be used.
        """
        core = await asyncio.to_thread(self._start_core, self._config)
        info = asdict(core.info)
        self._load = core.load()
        self._meter.follow(self._load, time.monotonic())  # so that the first requests count
        events = asyncio.get_running_loop()
        self._loop = EngineLoop(
            core,
            on_step=lambda deltas, load: post(
                events, self._publish, deltas, load, time.monotonic()
            ),
            on_death=lambda error: post(events, self._guard.end, error),
        )
        self._guard = EngineGuard(self._config, self._options, info, self._loop, self._on_end)
        self._ticker = asyncio.create_task(self._tick())
        self._watcher = asyncio.create_task(self._guard.run())
        for task in (self._ticker, self._watcher):
            task.add_done_callback(self._on_task_end)
        self._measurer = asyncio.create_task(self._lag.run())
        return {**info, "pid": os.getpid()}

    async def live(self) -> None:
        """Show life, while the engine starts."""

    async def submit(self, batch: bytes) -> None:
        """Hand a batch of encoded submissions to the loop; what was aborted already ends here.

        Raises:
            EngineDead: the loop has ended.
        """
        if self._report.dead is not None:
            raise EngineDead(self._report.dead)
        submissions = [i for i in decode_submissions(batch) if not self._aborted_early(i)]
        for item in submissions:
            subscriber = self._subscriber(item.subscriber_id)
            subscriber.request_ids.add(item.request.request_id)
            self._num_submitted += 1
            subscriber.submitted.append((self._num_submitted, item.request.request_id))
            self._owners[item.request.request_id] = item.subscriber_id
            self._ends.begin(item)
            self._spread(item)
        self._loop.submit([item.request for item in submissions])

    async def abort(self, request_ids: list[str]) -> None:
        """End requests; their blocks are free within a step.

        Unknown ids have ended already, or their requests are still to come and then end at once.
        """
        self._remember([i for i in request_ids if i not in self._owners])
        known = [i for i in request_ids if i in self._owners]
        if known:
            self._loop.abort(known)
            for request_id in known:
                self._forget(request_id, "abort")
            self._report_ready.set()

    async def missing(self, request_ids: list[str]) -> list[str]:
        """Those of the requests that are not here: they have ended, or have not come."""
        return [i for i in request_ids if i not in self._owners]

    async def subscribe(self, subscriber_id: str) -> AsyncIterator[bytes]:
        """The trunk: one encoded `TrunkMessage` a step, more steps in one while the reader is slow.

        Ends when the engine drains or dies, or when the same subscriber reads anew. Whoever stops
        reading, or does not acknowledge, has its requests aborted.
        """
        subscriber = self._subscriber(subscriber_id)
        self._readers += 1
        me = self._readers
        subscriber.attach(me)
        try:
            while subscriber.reader == me and not self._finished(subscriber):
                await subscriber.room.acquire()
                if subscriber.reader != me:
                    break
                deltas = await subscriber.mailbox.take()
                subscriber.last_sent = time.monotonic()
                self._load.overdue = self._guard.overdue
                yield encode(TrunkMessage(deltas, self._load, *subscriber.take_news()))
        finally:
            if subscriber.reader == me:
                self._drop(subscriber_id)

    async def acknowledge(self, subscriber_id: str, count: int) -> None:
        """Tell that so many more messages of a trunk have been read."""
        if subscriber_id in self._subscribers:
            self._subscribers[subscriber_id].acknowledge(count)

    async def watch(self, replica_pid: int = 0) -> AsyncIterator[bytes]:
        """The replica's own stream: encoded `EngineReport`s, at least one a heartbeat.

        A replica that stops reading is killed, if it has said which process it is.
        """
        told = False  # of the engine's end
        while not told or self._report.ended:
            self._guard.note_reading(replica_pid)
            await self._report_ready.wait()
            self._report_ready.clear()
            report, self._report = self._report, EngineReport([], self._load)
            self._report.dead = report.dead
            told = report.dead is not None
            report.load = self._load
            now = time.monotonic()
            report.progress_age_s = now - self._loop.last_progress
            report.use = self._meter.read(now)
            yield encode(report)
            await asyncio.sleep(REPORT_INTERVAL_S)
        await self._guard.dumped.wait()  # at its end the replica ends this process

    async def drain(self) -> None:
        """End every trunk that has nothing left to carry, and stop the loop."""
        self._draining = True
        self._watcher.cancel()
        self._wake_all()
        await asyncio.to_thread(self._loop.stop)

    def _spread(self, item: Submission) -> None:
        """Let the other ingress replicas know of a request, and what the cache will hold."""
        for subscriber_id, subscriber in self._subscribers.items():
            if subscriber_id != item.subscriber_id:
                subscriber.heard.append(item.blocks)

    def _subscriber(self, subscriber_id: str) -> Subscriber:
        return self._subscribers.setdefault(subscriber_id, Subscriber())

    def _remember(self, request_ids: list[str]) -> None:
        """Note aborts of requests that are not here, and forget old ones."""
        now = time.monotonic()
        self._early_aborts.update(dict.fromkeys(request_ids, now))
        memory = self._early_aborts
        while memory and (
            len(memory) > EARLY_ABORTS or now - next(iter(memory.values())) > EARLY_ABORTS_S
        ):
            memory.popitem(last=False)

    def _aborted_early(self, item: Submission) -> bool:
        """Whether the request's abort has overtaken it; its end is then reported."""
        request_id = item.request.request_id
        if self._early_aborts.pop(request_id, None) is None:
            return False
        self._report.ended.append(EndNotice(request_id, "abort", 0))
        self._report_ready.set()
        return True

    def _finished(self, subscriber: Subscriber) -> bool:
        over = self._draining or self._report.dead is not None
        return over and not len(subscriber.mailbox)

    def _publish(self, deltas: list[TokenDelta], load: EngineLoad, done_at: float) -> None:
        """Sort the deltas of a step, which was done at `done_at`, into the mailboxes."""
        self._load, self._load_since = load, time.monotonic()
        self._meter.follow(load, done_at)  # this may run late, and for several steps at once
        for delta in deltas:
            owner = self._owners.get(delta.request_id)
            if owner is not None:  # else it was aborted while the step ran
                self._subscribers[owner].mailbox.add(delta)
        self._count(deltas)
        for subscriber in self._subscribers.values():
            subscriber.settle(load.num_received)
        self._tell_load()

    def _tell_load(self) -> None:
        """Wake the trunks that are due to carry the load; of an idle engine, the others later."""
        idle = self._load.num_running + self._load.num_waiting == 0  # no later step would tell
        due_s = IDLE_INTERVAL_S if idle else LOAD_INTERVAL_S
        now, early = time.monotonic(), False
        for subscriber in self._subscribers.values():
            if subscriber.last_sent >= self._load_since:
                continue  # it has been told
            if now - subscriber.last_sent > due_s:
                subscriber.mailbox.wake()
            else:
                early = idle
        if early and self._telling is None:
            events = asyncio.get_running_loop()
            self._telling = events.call_later(IDLE_INTERVAL_S, self._tell_later)

    def _tell_later(self) -> None:
        self._telling = None
        self._tell_load()

    def _count(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            request_id = delta.request_id
            if delta.prefill_s:
                self._meter.note_first_token(delta.queued_s + delta.prefill_s, self._load_since)
                self._ends.note_first(delta)
            if request_id not in self._owners:
                continue
            so_far = self._num_tokens.get(request_id, 0)
            self._num_tokens[request_id] = so_far + len(delta.token_ids)
            if delta.finish_reason is not None:
                self._forget(request_id, delta.finish_reason, delta.refused)
        if self._report.ended:
            self._report_ready.set()

    def _forget(self, request_id: str, reason: str, refused: bool = False) -> None:
        owner = self._owners.pop(request_id)
        self._subscribers[owner].request_ids.discard(request_id)
        notice = EndNotice(request_id, reason, self._num_tokens.pop(request_id, 0))
        self._report.ended.append(notice)
        self._ends.tell(notice, refused)

    def _on_end(self, reason: str) -> None:
        """Tell on all trunks, and to the replica, that the engine ends."""
        self._report.dead = reason
        self._report_ready.set()
        self._wake_all()

    def _on_task_end(self, task: asyncio.Task[None]) -> None:
        """An engine that nobody looks after must not run on."""
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a watchdog failed", exc_info=error)
            self._guard.end(error)

    def _drop(self, subscriber_id: str) -> None:
        """Nobody reads this trunk any more: its requests would run for nobody."""
        orphans = list(self._subscribers[subscriber_id].request_ids)
        if orphans:
            logger.warning("%s left; aborting its %d requests", subscriber_id, len(orphans))
            self._loop.abort(orphans)
            for request_id in orphans:
                self._forget(request_id, "abort")
            self._report_ready.set()
        self._subscribers.pop(subscriber_id).attach(0)

    async def _tick(self) -> None:
        """Heartbeats, and the end of subscribers that never came or are gone."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            now = time.monotonic()
            for subscriber_id, subscriber in list(self._subscribers.items()):
                if now - subscriber.heard_from > UNREAD_LIMIT_S:
                    self._drop(subscriber_id)
            self._wake_all()
            self._report_ready.set()

    def _wake_all(self) -> None:
        for subscriber in self._subscribers.values():
            subscriber.mailbox.wake()
