"""Metrics, exported by Ray under `ray_trunkline_…` with the suffixes that vLLM uses.

Every call crosses into Ray's C++ core, so they are made once a report or a request, not a token.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import ray.util.metrics
from ray.serve.metrics import Counter, Gauge

from deployments.wire import EngineReport
from engine.outputs import EngineLoad

logger = logging.getLogger("ray.serve")

FAILURE_INTERVAL_S = 30.0
"""Failures of a metric that are closer to each other are not logged."""
T = TypeVar("T")
_TAGS = ("model_name",)


def _gauge(name: str, description: str) -> Gauge:
    return Gauge(f"trunkline_{name}", description=description, tag_keys=_TAGS)


def _counter(name: str, description: str, *more_tags: str) -> Counter:
    return Counter(f"trunkline_{name}", description=description, tag_keys=_TAGS + more_tags)


def harmless(record: Callable[[T], None]) -> Callable[[T], None]:
    """`record`, but what goes wrong in it is only logged: nothing depends on a metric."""
    next_log = 0.0

    def wrapped(value: T) -> None:
        nonlocal next_log
        try:
            record(value)
        except Exception:
            if (now := time.monotonic()) >= next_log:
                next_log = now + FAILURE_INTERVAL_S
                logger.exception("a metric could not be recorded")

    return wrapped


def lag_gauge(process: str) -> Callable[[float], None]:
    """What takes the event loop's lag of this process, in seconds; `process` says what it is.

    A metric of Ray, not of Serve: an engine actor is no replica.
    """
    gauge = ray.util.metrics.Gauge(
        "trunkline_event_loop_lag_seconds",
        description="Longest time within ten seconds by which an event loop came late.",
        tag_keys=("process",),
    )
    return harmless(lambda seconds: gauge.set(seconds, {"process": process}))


class EngineMetrics:
    """Load and totals of one engine, set by its replica."""

    def __init__(self, model_name: str) -> None:
        self._tags = {"model_name": model_name}
        self._last = EngineLoad()
        self._running = _gauge("num_requests_running", "Requests in the running batch.")
        self._waiting = _gauge("num_requests_waiting", "Requests that wait for admission.")
        self._usage = _gauge("kv_cache_usage_perc", "Share of KV blocks in use, from 0 to 1.")
        self._free = _gauge("kv_cache_free_blocks", "KV blocks that a new request could take.")
        self._progress_age = _gauge(
            "step_progress_age_seconds", "Time since a step ended, or an idle engine looked around."
        )
        self._tokens = _counter("generation_tokens", "Tokens generated.")
        self._ended = _counter("request_success", "Requests ended.", "finished_reason")
        self._preemptions = _counter("num_preemptions", "Requests pushed out and recomputed.")
        self._queries = _counter("prefix_cache_queries", "Prompt tokens looked up.")
        self._hits = _counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")

    def record(self, report: EngineReport) -> None:
        """Take over what an engine reported."""
        load, last, tags = report.load, self._last, self._tags
        self._last = load
        self._running.set(load.num_running, tags)
        self._waiting.set(load.num_waiting, tags)
        self._free.set(load.free_blocks, tags)
        self._progress_age.set(report.progress_age_s, tags)
        self._usage.set(1 - load.free_blocks / max(load.total_blocks, 1), tags)
        for counter, grown in (
            (self._tokens, report.new_tokens),
            (self._preemptions, load.num_preemptions - last.num_preemptions),
            (self._queries, load.prefix_queries - last.prefix_queries),
            (self._hits, load.prefix_hits - last.prefix_hits),
        ):
            if grown > 0:
                counter.inc(grown, tags)
        for notice in report.ended:
            self._ended.inc(1, {**tags, "finished_reason": notice.reason})
