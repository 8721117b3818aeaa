"""Metrics through Ray, which exports them as `ray_trunkline_…`.

All are gauges of Ray, also what counts: a histogram is the gauges `…_bucket`, `…_sum` and
`…_count`. So a counter is there from its 0, and gone with its process; Ray's own counters come with
their first increment, which `rate` then misses, and stay. Ray's own histograms cost a call for each
value, here and again in the agent of the node, which also takes the middle of its bucket for each.
Here the cost does not depend on the traffic.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import ray.util.metrics
from ray.serve.metrics import Gauge

from deployments.samples import FAMILIES, Sample, engine_samples
from deployments.wire import EngineReport

logger = logging.getLogger("ray.serve")

PUBLISH_INTERVAL_S = 5.0
"""Ray exports every 10 s, and drops what it has not been told again for a while."""
FAILURE_INTERVAL_S = 30.0
"""Failures of a metric that are closer to each other are not logged."""
T = TypeVar("T")


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
        description=FAMILIES["event_loop_lag_seconds"].says,
        tag_keys=("process",),
    )
    return harmless(lambda seconds: gauge.set(seconds, {"process": process}))


class Publisher:
    """Tells Ray samples. Belongs to a Serve replica, which Serve names in the labels."""

    def __init__(self) -> None:
        self._gauges: dict[str, Gauge] = {}

    def publish(self, samples: Iterable[Sample]) -> None:
        """Take over samples."""
        for family, value, labels, suffix in samples:
            name = f"trunkline_{family}{suffix}"
            gauge = self._gauges.get(name)
            if gauge is None:
                says = FAMILIES[family].says
                gauge = self._gauges[name] = Gauge(name, says, tag_keys=tuple(labels))
            gauge.set(value, dict(labels))


class EngineMetrics:
    """What an engine reports, told by its replica.

    Args:
        model_name: that clients use.
    """

    def __init__(self, model_name: str) -> None:
        self._labels = {"model_name": model_name}
        self._publisher = Publisher()
        self._next = 0.0

    def record(self, report: EngineReport) -> None:
        """Take over a report."""
        if (now := time.monotonic()) >= self._next:
            self._next = now + PUBLISH_INTERVAL_S
            self._publisher.publish(self._samples(report))

    def _samples(self, report: EngineReport) -> Iterator[Sample]:
        yield from engine_samples(report.load, self._labels)
        yield Sample("step_progress_age_seconds", report.progress_age_s, self._labels)


async def keep_publishing(samples: Callable[[], Iterable[Sample]]) -> None:
    """Tell Ray what `samples` returns, again and again, until cancelled."""
    publish = harmless(Publisher().publish)
    while True:
        publish(samples())
        await asyncio.sleep(PUBLISH_INTERVAL_S)
