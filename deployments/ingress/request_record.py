"""What is noted of a request while it is answered, to be told at its end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from deployments.journey import Journey

if TYPE_CHECKING:
    from deployments.ingress.errors import ApiError
    from engine.job import Job

RECORD: ContextVar[RequestRecord] = ContextVar("request_record")
"""That of the request which this context answers."""


class Stage(NamedTuple):
    """A part of a request's life, in seconds of `time.monotonic`."""

    name: str
    begin: float
    end: float


class Counts(NamedTuple):
    """Over all prompts and completions of a request."""

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    finish_reason: str
    """Joined by commas, where completions ended for different ones."""


@dataclass(slots=True)
class RequestRecord:
    """Times are in seconds of `time.monotonic`; those of what did not happen are 0."""

    request_id: str
    path: str
    traceparent: str | None = None
    """As the client sent it, see https://www.w3.org/TR/trace-context."""
    begun_at: float = field(default_factory=time.monotonic)
    """When its headers had come."""
    read_at: float = 0.0
    """When its body had come."""
    admitted_at: float = 0.0
    """When its body had been checked."""
    model: str | None = None
    """Served name."""
    journey: Journey | None = None
    """None until its prompts are sent to engines."""
    jobs: Sequence[Job] = ()
    status: int = 200
    """Of HTTP; 499 when the client left before the answer's end."""
    failure: ApiError | None = None
    """The error that it ended with, which may have come after the status."""

    def admit(self, model: str) -> None:
        """Note that its body is fine, and what model it wants."""
        self.model, self.admitted_at = model, time.monotonic()

    def send(self, jobs: Sequence[Job]) -> Journey:
        """Note that its prompts are sent to engines."""
        self.jobs, self.journey = jobs, Journey(self.request_id)
        return self.journey

    @property
    def failed(self) -> bool:
        """Whether it failed by the server's fault."""
        status = self.status if self.failure is None else self.failure.status
        return status >= 500

    def counts(self) -> Counts:
        """What was computed for it so far."""
        completions = [each for job in self.jobs for each in job.processors.values()]
        firsts = (next(iter(job.processors.values())) for job in self.jobs)
        return Counts(
            sum(len(job.prompt_token_ids) for job in self.jobs),
            sum(first.num_cached_tokens for first in firsts),
            sum(len(each.token_ids) for each in completions),
            ",".join(sorted({each.finish_reason or "abort" for each in completions})),
        )

    def stages(self, ended_at: float) -> list[Stage]:
        """The parts of its life that it came to, one after the other."""
        sent_at = 0.0 if self.journey is None else self.journey.sent_at
        marks = [
            ("read", self.read_at),
            ("validate", self.admitted_at),
            ("prepare", sent_at),
            *self._engine_marks(sent_at),
            ("write", ended_at),
        ]
        stages, begin = [], self.begun_at
        for name, end in marks:
            if end:
                stages.append(Stage(name, begin, max(begin, end)))
                begin = max(begin, end)
        return stages

    def _engine_marks(self, sent_at: float) -> list[tuple[str, float]]:
        """The ends of what engines do: of the prompt whose first token came first. They tell how
        long they took, and their clocks are not this one's."""
        started = [job.metrics for job in self.jobs if job.metrics.prefill_s]
        if not started:
            return []
        first = min(started, key=lambda each: each.first_token_time or each.finished_time or 0.0)
        token_at = first.first_token_time or first.finished_time or 0.0
        admitted_at = max(sent_at, token_at - first.prefill_s)
        marks = [
            ("route", max(sent_at, admitted_at - first.queued_s)),
            ("queue", admitted_at),
            ("prefill", token_at),
        ]
        if first.first_token_time is not None:  # an embedding has no tokens
            marks.append(("decode", max(job.metrics.finished_time or 0.0 for job in self.jobs)))
        return marks


def current_record() -> RequestRecord:
    """The record of the request that is answered, or one that nobody reads."""
    return RECORD.get(None) or RequestRecord("", "")
