"""Logs and traces to an OpenTelemetry collector, from threads of the SDK's own."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from deployments.observability.lines import fields_of
from deployments.observability.outages import TellingExporter

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider

    from deployments.observability.logs import Place

_SEVERITIES = {"DEBUG": 5, "INFO": 9, "WARNING": 13, "ERROR": 17, "CRITICAL": 21}
"""https://opentelemetry.io/docs/specs/otel/logs/data-model, "Severity fields"."""


class OtlpHandler(logging.Handler):
    """Hands records to the SDK, which sends them in batches.

    Args:
        endpoint: base address of the collector.
        place: whose records they are.
    """

    def __init__(self, endpoint: str, place: Place) -> None:
        from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
        from opentelemetry.sdk._logs import LoggerProvider
        from opentelemetry.sdk._logs.export import BatchLogRecordProcessor

        super().__init__()
        self._provider = LoggerProvider(resource_of(place))
        exporter = OTLPLogExporter(endpoint=f"{endpoint}/v1/logs")
        telling: Any = TellingExporter(exporter, "Log lines", endpoint)
        self._provider.add_log_record_processor(BatchLogRecordProcessor(telling))

    def emit(self, record: logging.LogRecord) -> None:
        """Hand over a record, unless it tells that records could not be sent."""
        from opentelemetry._logs import LogRecord, SeverityNumber

        if record.name.startswith("opentelemetry"):
            return
        fields = fields_of(record)
        if record.exc_text:
            fields["exception.stacktrace"] = record.exc_text
        self._provider.get_logger(record.name).emit(
            LogRecord(
                timestamp=int(record.created * 1e9),
                observed_timestamp=time.time_ns(),
                severity_text=record.levelname,
                severity_number=SeverityNumber(_SEVERITIES.get(record.levelname, 9)),
                body=record.getMessage(),
                attributes=fields,
            )
        )

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()
        super().close()


def make_tracer_provider(endpoint: str, sampling_ratio: float, place: Place) -> TracerProvider:
    """What makes traces and sends them in batches.

    Args:
        endpoint: base address of the collector.
        sampling_ratio: share of the traces that are made, by their ids, so that all services with
            the same ratio choose alike. Those that the caller does not make are not made.
        place: whose traces they are.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    ratio = TraceIdRatioBased(sampling_ratio)
    sampler = ParentBased(root=ratio, remote_parent_sampled=ratio)
    provider = TracerProvider(sampler=sampler, resource=resource_of(place))
    exporter = OTLPSpanExporter(endpoint=f"{endpoint}/v1/traces")
    telling: Any = TellingExporter(exporter, "Traces", endpoint)
    provider.add_span_processor(BatchSpanProcessor(telling))
    return provider


def resource_of(place: Place) -> Resource:
    """Who speaks, as OpenTelemetry's conventions have it."""
    from opentelemetry.sdk.resources import Resource

    instance = {"service.instance.id": place.instance} if place.instance else {}
    return Resource.create({"service.name": f"trunkline-{place.component}", **instance})
