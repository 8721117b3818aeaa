"""The Serve deployment of an engine: admission, accounting, health. No GPU work in its process."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
import ray
from ray import serve

from deployments import crash_dump, watchdog
from deployments.crash_dump import describe_error, write_aside, write_crash_dump
from deployments.engine_actor import EngineActor, StartCore
from deployments.engine_state import Traits
from deployments.load_meter import EngineUse
from deployments.metrics import EngineMetrics, harmless
from deployments.names import engine_actor_name
from deployments.observability.logs import Place, ProcessLog, configure_logging
from deployments.observability.options import LoggingOptions
from deployments.placement import Booking
from deployments.watchdog import Silence, WatchOptions
from deployments.wire import EngineReport, decode_report
from engine.config import EngineConfig
from engine.errors import EngineDead
from engine.outputs import EngineLoad

logger = logging.getLogger("ray.serve")

SILENCE_LIMIT_S = watchdog.SILENCE_LIMIT_S
"""An engine actor that has not reported for this long (it does so every second) is stopped, or
nothing in it gets to run."""
START_SILENCE_LIMIT_S = 600.0
"""An engine actor that gives no sign of life for this long while it starts is stopped, or hangs.
No other thread runs while one loads a library: those of torch have gigabytes, which may take
minutes from a cold network file system. No request waits for this engine yet, but one that is
given up too early never starts."""
EARLY_ENDS = 4096
"""So many ends of requests whose calls have not come yet are remembered."""
LOST_CALLS_S = 15.0
"""A call whose request the engine has not had for so long, at two looks, ends."""
UNREAD_OBJECTS = 2
"""Reports that the engine may send ahead; then it merges, and notices that nobody reads."""


class EngineReplica:
    """Creates its engine actor, and holds a call open for each request that the actor has."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        model_name: str,
        config: EngineConfig,
        actor_options: dict[str, Any],
        start_core: StartCore,
        options: WatchOptions = WatchOptions(),  # noqa: B008  # it is frozen
        logging_options: LoggingOptions = LoggingOptions(),  # noqa: B008  # likewise
    ) -> None:
        self._config = config
        self._options = options
        replica_id = serve.get_replica_context().replica_id.unique_id
        place = Place("engine_replica", model_name, replica_id)
        configure_logging(ProcessLog(logging_options, place))
        log = ProcessLog(logging_options, replace(place, component="engine"))
        self._actor = (
            ray.remote(EngineActor)
            .options(
                name=engine_actor_name(replica_id),
                max_concurrency=1000,
                # As for Serve's own actors: the cluster's head would keep a record of every call,
                # a hundred thousand of them.
                enable_task_events=False,
                **actor_options,
            )
            .remote(config, start_core, options, log)
        )
        self._ends: dict[str, asyncio.Future[str]] = {}
        self._early_ends: OrderedDict[str, str] = OrderedDict()
        """Finish reasons of requests whose calls have not come yet."""
        self._dead: str | None = None
        self._load = EngineLoad()
        self._use = EngineUse()
        self._tasks: list[asyncio.Task[None]] = []
        self._ending: asyncio.Task[None] | None = None
        self.info = await self._start()
        # Not before: loading may take minutes.
        self._silence = Silence()
        self._record = harmless(EngineMetrics(model_name).record)
        work = (self._watch(), self._guard(), self._end_lost_calls())
        self._tasks = [asyncio.create_task(each) for each in work]

    async def _start(self) -> dict[str, Any]:
        """Start the engine; returns the fields of its `EngineInfo`, and its `pid`.

        Raises:
            EngineDead: it shows no life.
        """
        start = asyncio.ensure_future(self._actor.start.remote())
        sign = asyncio.ensure_future(self._actor.live.remote())
        silence = Silence()
        while not start.done():
            await asyncio.wait([start], timeout=watchdog.LOOK_S)
            if sign.done():
                if not sign.exception():
                    silence.end()
                sign = asyncio.ensure_future(self._actor.live.remote())
            if silence.look() > START_SILENCE_LIMIT_S and not self._options.off:
                ray.kill(self._actor)
                raise EngineDead(
                    f"the engine, while it started, showed no life for {silence.seconds:.0f} s"
                )
        sign.cancel()
        info: dict[str, Any] = start.result()
        return info

    async def generate(self, booking: Booking) -> str:
        """Wait for the end of a request and return its finish reason.

        The ingress sends the request to the engine itself, and gets its tokens from there; this
        call is held open so that Serve's own count of ongoing requests stays true. Cancelling it
        aborts the request.

        Raises:
            EngineDead: the engine died first.
        """
        if self._dead is not None:
            raise EngineDead(self._dead)
        request_id = booking.request_id
        if (reason := self._early_ends.pop(request_id, None)) is not None:
            return reason
        end: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        first = self._ends.get(request_id)
        self._ends[request_id] = end
        if first is not None and not first.done():
            # Serve calls again when it has not learned that a call had come.
            first.set_exception(EngineDead("the call was made again"))
        try:
            return await end
        finally:
            if self._ends.get(request_id) is end:
                del self._ends[request_id]
                if end.cancelled():
                    self._actor.abort.remote([request_id])

    async def check_health(self) -> None:
        """Raise when the engine is dead or silent; a step that hangs is its death."""
        if self._dead is not None:
            raise EngineDead(self._dead)
        if self._silence.seconds > SILENCE_LIMIT_S:
            raise EngineDead(f"the engine has not reported for {self._silence.seconds:.0f} s")

    async def record_replica_metadata(self) -> dict[str, Any]:
        """Called by Serve at the start, for its routers: the fields of the engine's `Traits`."""
        options = hashlib.sha256(self._config.model_dump_json().encode()).hexdigest()
        return Traits(options, self._config.max_num_seqs)._asdict()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve, for its autoscaling policy: the fields of an `EngineUse`."""
        return self._use._asdict()

    async def __del__(self) -> None:
        """Called by Serve when ongoing calls have ended: end the trunks, then the actor."""
        if not self._tasks:  # the engine did not start
            return
        for task in self._tasks:
            task.cancel()
        await asyncio.wait([asyncio.ensure_future(self._actor.drain.remote())], timeout=10)

    async def _watch(self) -> None:
        """Follow the engine's reports to their end, which is the end of this replica too."""
        reports = self._actor.watch.options(
            num_returns="streaming", _generator_backpressure_num_objects=UNREAD_OBJECTS
        ).remote(os.getpid())
        reason, error = "end", None
        try:
            async for ref in reports:
                self._take(decode_report(await ref))
        except ray.exceptions.RayError as failure:
            reason, error = "lost process", failure
        except Exception as failure:  # without its reports no request would ever end
            logger.exception("cannot follow the engine's reports")
            reason, error = "unreadable report", failure
        told = "it shut down" if error is None else f"{type(error).__name__}: {error}"
        self._die(f"the engine actor ended: {told}", reason, error)

    async def _guard(self) -> None:
        """Look whether the engine reports; if not, nothing in its process runs any more."""
        if self._options.off:
            return
        while self._silence.look() <= SILENCE_LIMIT_S:
            await asyncio.sleep(watchdog.LOOK_S)
        watchdog.ask_for_stacks(self.info["pid"])
        self._die(f"the engine has not reported for {SILENCE_LIMIT_S:.0f} s", "silence")

    async def _end_lost_calls(self) -> None:
        """End calls whose requests are not at the engine: they were lost on the way, or their ends
        had been told before the calls came. They would count for ever."""
        missing: set[str] = set()
        while True:
            await asyncio.sleep(LOST_CALLS_S)
            before = missing
            try:
                missing = set(await self._actor.missing.remote(list(self._ends)))
            except Exception as error:  # an engine may outlive that; else `_watch` notices its end
                logger.warning("cannot look for lost calls now: %s", error)
                continue
            for request_id in missing & before & self._ends.keys():
                if not self._ends[request_id].done():
                    self._ends[request_id].set_result("abort")

    def _take(self, report: EngineReport) -> None:
        self._silence.end()
        self._load, self._use = report.load, report.use
        self._dead = report.dead or self._dead
        for notice in report.ended:
            end = self._ends.get(notice.request_id)
            if end is None:
                self._early_ends[notice.request_id] = notice.reason
            elif not end.done():
                end.set_result(notice.reason)
        while len(self._early_ends) > EARLY_ENDS:
            self._early_ends.popitem(last=False)
        if self._dead is not None:  # the reports end later, when its dump is written
            self._fail_calls()
        self._record(report)

    def _die(self, message: str, reason: str, error: Exception | None = None) -> None:
        """End, and leave a dump of what is known here of an engine that has not told its end."""
        if self._ending is not None:
            return
        dump: Callable[[], object] | None = None
        if self._dead is None:
            self._dead = message
            dump = partial(self._dump, reason, error or message, list(self._ends))
        logger.error("%s; this replica ends and will be replaced", self._dead)
        self._fail_calls()
        self._ending = asyncio.create_task(self._end(dump))

    def _dump(self, reason: str, error: Exception | str, request_ids: list[str]) -> None:
        write_crash_dump(
            self._options.crash_dump_dir,
            reason,
            engine=self._config.model_dump(mode="json"),
            engine_pid=self.info["pid"],
            last_load=msgspec.structs.asdict(self._load),
            requests=request_ids,
            error=error if isinstance(error, str) else describe_error(error),
        )

    def _fail_calls(self) -> None:
        for end in self._ends.values():
            if not end.done():
                end.set_exception(EngineDead(str(self._dead)))

    async def _end(self, dump: Callable[[], object] | None) -> None:
        """End both processes: Serve replaces a dead replica at once, while an unhealthy one would
        have to fail several health checks first.

        The engine's first, which may be stopped or hang in a call of its device: Ray would leave it
        the memory of a GPU for seconds, which the replacement wants.
        """
        writing = [write_aside(dump)] if dump is not None else []
        await asyncio.sleep(watchdog.EXIT_DELAY_S)
        watchdog.kill_process(self.info["pid"])
        if writing:
            await asyncio.wait(writing, timeout=crash_dump.WRITE_LIMIT_S)
        watchdog.end_process()
