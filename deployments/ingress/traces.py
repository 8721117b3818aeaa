"""OpenTelemetry traces of requests, made at their ends from what was noted of them.

So tokens cost nothing, and a request that is not sampled next to nothing.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from deployments.observability.otlp import make_tracer_provider

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from deployments.ingress.request_record import RequestRecord, Stage
    from deployments.observability.logs import Place
    from deployments.observability.options import TracingOptions


class Traces:
    """Makes a span of each request, and one in it of each of its stages.

    Args:
        options: of tracing; they name an endpoint.
        place: whose spans they are.
    """

    def __init__(self, options: TracingOptions, place: Place) -> None:
        self._provider = make_tracer_provider(
            str(options.otlp_endpoint), options.sampling_ratio, place
        )
        self._tracer = self._provider.get_tracer("trunkline")
        self._propagator = TraceContextTextMapPropagator()

    def add(self, record: RequestRecord, stages: list[Stage]) -> str | None:
        """Make the trace of a request; returns its id, or None if it is not sampled."""
        clock_ns = time.time_ns() - int(time.monotonic() * 1e9)

        def at(seconds: float) -> int:
            return clock_ns + int(seconds * 1e9)

        parent = self._propagator.extract({"traceparent": record.traceparent or ""})
        span = self._tracer.start_span(
            f"POST {record.path}", parent, SpanKind.SERVER, start_time=at(record.begun_at)
        )
        if not span.is_recording():
            return None
        span.set_attributes(_attributes(record))
        inside = set_span_in_context(span)
        for stage in stages:
            part = self._tracer.start_span(stage.name, inside, start_time=at(stage.begin))
            part.end(at(stage.end))
        for moved_at in record.journey.moved_at if record.journey else ():
            span.add_event("failover", timestamp=at(moved_at))
        _set_failure(span, record)
        span.end(at(stages[-1].end))
        return f"{span.get_span_context().trace_id:032x}"

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def _attributes(record: RequestRecord) -> dict[str, Any]:
    """As far as there are conventions: https://opentelemetry.io/docs/specs/semconv/gen-ai."""
    attributes = {
        "http.route": record.path,
        "http.response.status_code": record.status,
        "gen_ai.request.model": record.model or "",
        "trunkline.request_id": record.request_id,
    }
    if record.journey is not None:
        counts = record.counts()
        attributes |= {
            "gen_ai.usage.input_tokens": counts.prompt_tokens,
            "gen_ai.usage.output_tokens": counts.output_tokens,
            "gen_ai.response.finish_reasons": counts.finish_reason.split(","),
            "trunkline.cached_tokens": counts.cached_tokens,
            "trunkline.engines": record.journey.engines,
        }
    return attributes


def _set_failure(span: Span, record: RequestRecord) -> None:
    if record.failure is not None:
        span.set_attribute("error.type", record.failure.code or record.failure.kind)
    if record.failed:
        span.set_status(Status(StatusCode.ERROR))
