"""Tells of each request at its end: a line in the log, a trace, and a count."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from starlette.types import Scope

from deployments.ingress.gate import OPEN_PATHS, path_in_app
from deployments.ingress.request_counts import AnswerCounts
from deployments.ingress.request_ids import request_id
from deployments.ingress.request_record import RECORD, RequestRecord, Stage
from deployments.observability.logs import REQUEST_ID

if TYPE_CHECKING:
    from deployments.ingress.traces import Traces

logger = logging.getLogger("trunkline.requests")

CLIENT_LEFT = 499
"""Status in lines and traces of an answer whose client did not wait for its end."""
_TOLD = {"queue": "queued_s", "prefill": "prefill_s", "decode": "decode_s"}
"""Stages whose lengths lines tell."""


class Journal:
    """Keeps the record of each request, and tells of it when it has ended.

    Args:
        log_requests: whether all requests to models get a line; those that fail by the server's
            fault do in any case.
        traces: what makes traces; None makes none.
        answers: where requests are counted.
    """

    def __init__(
        self,
        log_requests: bool = False,
        traces: Traces | None = None,
        answers: AnswerCounts | None = None,
    ) -> None:
        self._log_requests = log_requests
        self._traces = traces
        self._answers = answers or AnswerCounts()

    def open(self, scope: Scope) -> RequestRecord:
        """The record of a request whose headers have come."""
        record = RequestRecord(request_id(scope["headers"]), path_in_app(scope))
        if self._traces is not None:
            record.traceparent = dict(scope["headers"]).get(b"traceparent", b"").decode("latin-1")
        return record

    @contextmanager
    def follow(self, record: RequestRecord) -> Iterator[None]:
        """Make a record the one of what runs within, and tell of it at the end."""
        REQUEST_ID.set(record.request_id)
        RECORD.set(record)
        try:
            yield
        except BaseException:  # it was cancelled, or what it writes to has gone
            record.status = CLIENT_LEFT
            raise
        finally:
            self.tell(record)

    def tell(self, record: RequestRecord) -> None:
        """Tell of a request that has ended."""
        if record.path not in OPEN_PATHS:
            self._answers.add(record)
        about_model = record.model is not None
        writes = record.failed or (self._log_requests and (about_model or record.failure))
        traced = self._traces is not None and about_model
        if not writes and not traced:
            return
        stages = record.stages(time.monotonic())
        trace_id = self._traces.add(record, stages) if traced and self._traces else None
        if writes:
            level = logging.WARNING if record.failed else logging.INFO
            message = "request failed" if record.failure else "request ended"
            logger.log(level, message, extra={**_fields(record, stages), "trace_id": trace_id})

    def close(self) -> None:
        """Send what is left of traces, which takes long if the collector is not there."""
        if self._traces is not None:
            self._traces.close()


def _fields(record: RequestRecord, stages: list[Stage]) -> dict[str, Any]:
    journey = record.journey
    fields = {
        "model": record.model,
        "request_id": record.request_id,
        "path": record.path,
        "status": record.status,
        "error_type": record.failure and (record.failure.code or record.failure.kind),
        "engines": journey and journey.engines,
        "failovers": journey and len(journey.moved_at),
        "duration_s": stages[-1].end - record.begun_at,
        **{_TOLD[s.name]: s.end - s.begin for s in stages if s.name in _TOLD},
    }
    if record.jobs:
        first = min(
            filter(None, (job.metrics.first_token_time for job in record.jobs)), default=None
        )
        fields["ttft_s"] = None if first is None else first - record.begun_at
        fields |= record.counts()._asdict()
    return fields
