"""What an ingress replica counts of its requests: each once, when it ends."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from deployments.ingress.request_record import RequestRecord
from deployments.samples import TOKEN_SECONDS, TOKENS, Histogram, Labels, Sample
from engine.errors import InvalidRequest
from engine.job import Job

if TYPE_CHECKING:
    from deployments.ingress.errors import ApiError

FINISH_REASONS = ("stop", "length", "abort", "error")

EXPECTED_ANSWERS = (
    (200, ""),
    (429, "backlog"),
    (429, "rate_limit_exceeded"),
    (429, "too_many_requests"),
    (500, "server_error"),
    (503, "engine_failed"),
    (503, "engine_lost"),
    (503, "no_engine"),
    (503, "queue_full"),
)
"""Told from the start, so that the first of them is seen as an increase."""


class AnswerCounts:
    """Of all answers to requests that want something of a model, and of all that are errors."""

    def __init__(self) -> None:
        self.counts = Counter(dict.fromkeys(EXPECTED_ANSWERS, 0))
        """By status and reason, which is empty where nothing went wrong."""

    def add(self, record: RequestRecord) -> None:
        """Count a request that has ended; one that fails in its stream as if it had begun so."""
        if record.failure is not None:
            self.refuse(record.failure)
        elif record.model is not None:
            self.counts[record.status, "" if record.status < 400 else "client_left"] += 1

    def refuse(self, error: ApiError) -> None:
        """Count an answer that is an error."""
        self.counts[error.status, error.reason] += 1

    def samples(self, labels: Labels) -> Iterator[Sample]:
        """All of it."""
        for (status, reason), count in self.counts.items():
            answer = {"status": str(status), "reason": reason, **labels}
            yield Sample("http_requests_total", count, answer)


class TokenGaps:
    """Counts the times between the messages that bring the tokens of one completion.

    Args:
        histogram: where they are counted.
    """

    __slots__ = ("_add", "_last")

    def __init__(self, histogram: Histogram) -> None:
        self._add = histogram.add
        self._last = 0.0

    def note(self) -> None:
        """Tokens have come now."""
        now = time.monotonic()
        if self._last:
            self._add(now - self._last)
        self._last = now


class RequestCounts:
    """Of one model."""

    def __init__(self) -> None:
        self.num_failovers = 0
        """Times that a completion had to go on elsewhere."""
        self.ended = Counter(dict.fromkeys(FINISH_REASONS, 0))
        """Completions that have ended, by finish reason."""
        self.prompt_tokens = Histogram(TOKENS)
        """Of each prompt."""
        self.generated_tokens = Histogram(TOKENS)
        """Of each completion."""
        self.first_token_s = Histogram()
        """Seconds to the first token of a prompt's completions."""
        self.queue_s = Histogram()
        """Of these, seconds until the first of them was computed."""
        self.prefill_s = Histogram()
        """And seconds from there."""
        self.decode_s = Histogram()
        """Seconds from the first token of a prompt's completions to the last."""
        self.latency_s = Histogram()
        """Seconds to the last token of a prompt's completions, or to its embedding."""
        self.token_s = Histogram(TOKEN_SECONDS)
        """Seconds between tokens, the mean of a prompt's longest completion."""
        self.gap_s = Histogram(TOKEN_SECONDS)
        """Seconds between messages with tokens, of requests for one completion."""

    @contextmanager
    def follow(self, record: RequestRecord) -> Iterator[TokenGaps | None]:
        """Count a request's jobs when they have ended, in whatever way.

        Yields:
            What is to be told of tokens, where messages bring those of one completion.
        """
        unfinished, jobs = "abort", record.jobs
        alone = len(jobs) == len(jobs[0].requests) == 1
        try:
            yield TokenGaps(self.gap_s) if alone else None
        except InvalidRequest:
            raise  # none is lost that the engine could not have computed
        except Exception:
            unfinished = "error"
            raise
        finally:
            if record.journey is not None:
                self.num_failovers += len(record.journey.moved_at)
            for job in jobs:
                self._count(job, record.read_at, unfinished)

    def _count(self, job: Job, arrived_at: float, unfinished: str) -> None:
        self.prompt_tokens.add(len(job.prompt_token_ids))
        for processor in job.processors.values():
            self.generated_tokens.add(len(processor.token_ids))
            self.ended[processor.finish_reason or unfinished] += 1
        times = job.metrics
        first, finished = times.first_token_time, times.finished_time
        if finished is not None:
            self.latency_s.add(finished - arrived_at)
        if first is None:  # an embedding has no tokens
            return
        self.first_token_s.add(first - arrived_at)
        self.prefill_s.add(times.prefill_s)
        self.queue_s.add(max(0.0, first - arrived_at - times.prefill_s))
        if finished is not None:
            self.decode_s.add(finished - first)
            longest = max(len(processor.token_ids) for processor in job.processors.values())
            if longest > 1:
                self.token_s.add((finished - first) / (longest - 1))

    def samples(self, labels: Labels) -> Iterator[Sample]:
        """All of it."""
        yield Sample("num_failovers_total", self.num_failovers, labels)
        for reason, count in self.ended.items():
            ended = {**labels, "finished_reason": reason}
            yield Sample("request_success_total", count, ended)
        for family, histogram in (
            ("request_prompt_tokens", self.prompt_tokens),
            ("request_generation_tokens", self.generated_tokens),
            ("time_to_first_token_seconds", self.first_token_s),
            ("inter_token_latency_seconds", self.gap_s),
            ("request_time_per_output_token_seconds", self.token_s),
            ("e2e_request_latency_seconds", self.latency_s),
            ("request_queue_time_seconds", self.queue_s),
            ("request_prefill_time_seconds", self.prefill_s),
            ("request_decode_time_seconds", self.decode_s),
        ):
            yield from histogram.samples(family, labels)
