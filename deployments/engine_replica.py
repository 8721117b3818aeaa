"""The Serve deployment of an engine: admission, accounting, health. No GPU work in its process."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import time
from typing import Any

import ray
from ray import serve

from deployments.engine_actor import EngineActor, StartCore
from deployments.metrics import EngineMetrics
from deployments.names import engine_actor_name
from deployments.placement import Booking
from deployments.wire import (
    EngineReport,
    Submission,
    decode_report,
    decode_submission,
    encode,
)
from engine.config import EngineConfig
from engine.errors import EngineDead
from engine.outputs import EngineLoad

logger = logging.getLogger("ray.serve")

STALL_LIMIT_S = 60.0
"""An engine that has work and finishes no step for this long counts as hung.

Longer than any sane step: a chunk of prefill on a CPU takes seconds.
"""
SILENCE_LIMIT_S = 10.0
"""An engine actor that has not reported for this long (it does so every second) is unhealthy."""
EXIT_DELAY_S = 0.5
"""Time for the errors of unfinished requests to leave before the process ends."""
UNREAD_OBJECTS = 8
"""Messages of a stream that the engine may send ahead of its reader; then it merges."""


class EngineReplica:
    """Creates its engine actor, hands it requests, and holds a call open for each of them."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: EngineConfig, actor_options: dict[str, Any], start_core: StartCore
    ) -> None:
        replica_id = serve.get_replica_context().replica_id.unique_id
        self._actor = (
            ray.remote(EngineActor)
            .options(
                name=engine_actor_name(replica_id),
                max_concurrency=1000,
                **actor_options,
            )
            .remote(config, start_core)
        )
        self._ends: dict[str, asyncio.Future[str]] = {}
        self._outbox: list[Submission] = []
        self._submitting: set[asyncio.Task[None]] = set()
        self._dead: str | None = None
        self._load = EngineLoad()
        self._progress_age_s = 0.0
        self._watcher: asyncio.Task[None] | None = None
        self.info = await self._actor.start.remote()
        # Not before: loading may take minutes, and Serve checks the health right after this.
        self._last_report = time.monotonic()
        self._metrics = EngineMetrics(self.info["model"])
        self._watcher = asyncio.create_task(self._watch())

    async def generate(self, submission: bytes, booking: Booking) -> str:
        """Run one request and return its finish reason when it has ended.

        The tokens go to the subscriber named in the submission; this call is held open so that
        Serve's own count of ongoing requests stays true. Cancelling it aborts the request.

        Args:
            submission: an encoded `Submission`.
            booking: what the router books; not used here.

        Raises:
            EngineDead: the engine died first.
        """
        if self._dead is not None:
            raise EngineDead(self._dead)
        item = decode_submission(submission)
        request_id = item.request.request_id
        end: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._ends[request_id] = end
        if not self._outbox:
            # Ray takes a call for a child of the request in whose context it is made, and cancels
            # it when that request is cancelled: with it would go the others of the batch.
            asyncio.get_running_loop().call_soon(self._flush, context=contextvars.Context())
        self._outbox.append(item)
        try:
            return await end
        finally:
            if self._ends.pop(request_id, None) and end.cancelled():
                self._actor.abort.remote([request_id])

    async def check_health(self) -> None:
        """Raise when the engine is dead, silent or stalled."""
        if self._dead is not None:
            raise EngineDead(self._dead)
        silent_s = time.monotonic() - self._last_report
        if silent_s > SILENCE_LIMIT_S:
            raise EngineDead(f"the engine has not reported for {silent_s:.0f} s")
        if self._progress_age_s + silent_s > STALL_LIMIT_S:
            raise EngineDead(f"no step has finished for {self._progress_age_s + silent_s:.0f} s")

    async def __del__(self) -> None:
        """Called by Serve when ongoing calls have ended: end the trunks, then the actor."""
        if self._watcher is None:  # the engine did not start
            return
        self._watcher.cancel()
        await asyncio.wait([asyncio.ensure_future(self._actor.drain.remote())], timeout=10)

    def _flush(self) -> None:
        """Submit all that arrived in this turn of the event loop as one batch."""
        batch, self._outbox = self._outbox, []
        task = asyncio.create_task(self._submit(batch))
        self._submitting.add(task)
        task.add_done_callback(self._submitting.discard)

    async def _submit(self, batch: list[Submission]) -> None:
        """Hand a batch to the engine; requests that it did not get end here, to be tried again."""
        try:
            await self._actor.submit.remote(encode(batch))
        except Exception as error:
            logger.exception("the engine did not take %d requests", len(batch))
            for item in batch:
                end = self._ends.get(item.request.request_id)
                if end is not None and not end.done():
                    end.set_exception(EngineDead(f"the engine did not take it: {error}"))

    async def _watch(self) -> None:
        """Follow the engine's reports to their end, which is the end of this replica too."""
        reports = self._actor.watch.options(
            num_returns="streaming", _generator_backpressure_num_objects=UNREAD_OBJECTS
        ).remote()
        try:
            async for ref in reports:
                self._take(decode_report(await ref))
        except ray.exceptions.RayError as error:
            self._dead = f"the engine actor died: {error}"
        except Exception as error:  # without its reports no request would ever end
            logger.exception("cannot follow the engine's reports")
            self._dead = f"its reports cannot be followed: {type(error).__name__}: {error}"
        self._die()

    def _take(self, report: EngineReport) -> None:
        self._last_report = time.monotonic()
        self._progress_age_s = report.progress_age_s
        self._load = report.load
        self._dead = report.dead or self._dead
        for notice in report.ended:
            end = self._ends.get(notice.request_id)
            if end is not None and not end.done():
                end.set_result(notice.reason)
        self._metrics.record(report)

    def _die(self) -> None:
        """Fail what is open and end the process: Serve replaces a dead replica at once, while an
        unhealthy one would have to fail several health checks first."""
        self._dead = self._dead or "the engine actor ended"
        logger.error("%s; this replica ends and will be replaced", self._dead)
        for end in self._ends.values():
            if not end.done():
                end.set_exception(EngineDead(self._dead))
        asyncio.get_running_loop().call_later(EXIT_DELAY_S, os._exit, 1)
