"""A collector that does not take what it gets is told of once, and so is its return."""

from __future__ import annotations

import logging

from opentelemetry.exporter.otlp.proto.http import trace_exporter

from deployments.observability.logs import Place
from deployments.observability.otlp import make_tracer_provider
from deployments.observability.outages import TellingExporter


def test_a_collector_that_refuses_is_told_of_once(collector, caplog):
    provider = make_tracer_provider(collector.url, 1.0, Place("ingress"))
    for status in (401, 401, 200, 200, 403):
        collector.status = status
        provider.get_tracer("t").start_span("s").end()
        provider.force_flush()
    provider.shutdown()
    lost, back, lost_again = [record.getMessage() for record in caplog.records]
    begin = f"Traces do not reach the collector at {collector.url}, and are dropped until they do: "
    assert lost.startswith(begin) and "code: 401" in lost
    assert back == f"Traces reach the collector at {collector.url} again"
    assert lost_again.startswith(begin) and "code: 403" in lost_again
    assert not logging.getLogger(trace_exporter.__name__).filters


class Unreachable:
    """Logs as OpenTelemetry's exporters do."""

    def export(self, _):
        log = logging.getLogger(__name__)
        log.warning("Transient error %s, retrying in %.2fs.", OSError("HTTPConnectionPool(…"), 1.0)
        log.error("Failed to export %s batch due to timeout, max retries or shutdown.", "spans")
        return trace_exporter.SpanExportResult.FAILURE

    def shutdown(self):
        pass


def test_one_that_cannot_be_reached_is_told_of_in_one_line(caplog):
    exporter = TellingExporter(Unreachable(), "Log lines", "http://c:1")
    exporter.export([])
    exporter.export([])
    exporter.shutdown()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        "Log lines do not reach the collector at http://c:1, and are dropped until they do: OSError"
    )
