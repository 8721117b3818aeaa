"""What an ingress replica counts of its requests, each once, when it ends."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from engine.job import Job

_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)


class Histogram:
    """Counts values by size, as Prometheus has it.

    Args:
        bounds: upper ones of the buckets, ascending; a last bucket has none.
    """

    def __init__(self, bounds: Sequence[float] = _SECONDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """By bucket, each for itself."""
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class RequestCounts:
    """Of one model."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.ended: Counter[str] = Counter()
        """Completions that have ended, by finish reason."""
        self.first_token_s = Histogram()
        """Seconds to the first token of a prompt's completions."""
        self.latency_s = Histogram()
        """Seconds to the last token of a prompt's completions, or to its embedding."""
        self.token_s = Histogram()
        """Seconds between tokens, the mean of a completion."""

    @contextmanager
    def follow(self, jobs: Sequence[Job]) -> Iterator[None]:
        """Count jobs when they have ended, in whatever way."""
        unfinished = "abort"
        try:
            yield
        except Exception:
            unfinished = "error"
            raise
        finally:
            for job in jobs:
                self._count(job, unfinished)

    def _count(self, job: Job, unfinished: str) -> None:
        self.prompt_tokens += len(job.prompt_token_ids)
        for processor in job.processors.values():
            self.generation_tokens += len(processor.token_ids)
            self.ended[processor.finish_reason or unfinished] += 1
        times = job.metrics
        if times.finished_time is not None:
            self.latency_s.add(times.finished_time - times.arrival_time)
        if times.first_token_time is None:  # an embedding has no tokens
            return
        self.first_token_s.add(times.first_token_time - times.arrival_time)
        longest = max(len(processor.token_ids) for processor in job.processors.values())
        if times.finished_time is not None and longest > 1:
            self.token_s.add((times.finished_time - times.first_token_time) / (longest - 1))
