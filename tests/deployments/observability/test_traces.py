"""Traces of requests, as a collector gets them."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from deployments.ingress.app import build_asgi_app
from deployments.ingress.journal import Journal
from deployments.ingress.served import ServedModels
from deployments.ingress.traces import Traces
from deployments.observability.logs import Place
from deployments.observability.options import TracingOptions
from tests.deployments.plane import OPTIONS, open_plane

BODY = {"model": "m", "prompt": "Pfirsich Melba", "max_tokens": 5}
PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@asynccontextmanager
async def traced(collector, sampling_ratio=1.0, **fake):
    """A plane that traces, and how to get the spans of what it did."""
    options = TracingOptions(otlp_endpoint=collector.url, sampling_ratio=sampling_ratio)
    traces = Traces(options, Place("ingress", None, "i1"))
    async with open_plane(**fake) as plane:
        app = build_asgi_app(
            ServedModels({"m": plane.model}), OPTIONS, journal=Journal(False, traces)
        )
        transport = httpx.ASGITransport(app)
        plane.lifespan = app.router.lifespan_context(app)

        async def spans():
            await asyncio.to_thread(traces.close)
            return [span for _, _, body in collector.received for span in spans_in(body)]

        async with httpx.AsyncClient(transport=transport, base_url="http://test") as plane.http:
            yield plane, spans


def spans_in(body: bytes) -> list[Span]:
    (batch,) = ExportTraceServiceRequest.FromString(body).resource_spans
    return [span for scope in batch.scope_spans for span in scope.spans]


def values_of(span: Span) -> dict[str, object]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


async def ask(plane, **headers):
    return await plane.http.post("/v1/completions", json=BODY, headers=headers)


async def test_a_trace_tells_the_stages_of_a_request_in_order(collector):
    async with traced(collector, step_s=0.005) as (plane, spans):
        await ask(plane, **{"x-request-id": "mine"})
        *stages, whole = await spans()
    names = ["read", "validate", "prepare", "route", "queue", "prefill", "decode", "write"]
    assert [stage.name for stage in stages] == names
    assert {stage.parent_span_id for stage in stages} == {whole.span_id}
    times = [time for s in stages for time in (s.start_time_unix_nano, s.end_time_unix_nano)]
    assert times == sorted(times)
    assert times[0] == whole.start_time_unix_nano and times[-1] == whole.end_time_unix_nano
    assert (whole.name, whole.kind) == ("POST /v1/completions", Span.SPAN_KIND_SERVER)
    values = values_of(whole)
    assert values["trunkline.request_id"] == "mine"
    assert values["gen_ai.request.model"] == "m"
    assert (values["gen_ai.usage.input_tokens"], values["gen_ai.usage.output_tokens"]) == (6, 5)
    assert values["http.response.status_code"] == 200
    assert "Pfirsich" not in str(collector.received)


async def test_traces_are_sent_before_the_process_ends(collector):
    async with traced(collector) as (plane, _):
        async with plane.lifespan:
            await ask(plane)
        assert len(collector.received) == 1


async def test_the_trace_of_the_client_goes_on(collector):
    async with traced(collector) as (plane, spans):
        await ask(plane, traceparent=f"00-{PARENT[0]}-{PARENT[1]}-01")
        *_, whole = await spans()
    assert (whole.trace_id.hex(), whole.parent_span_id.hex()) == PARENT


@pytest.mark.parametrize("odd", ["00-zz", "x" * 5000, f"00-{'0' * 32}-{PARENT[1]}-01"])
async def test_an_odd_parent_is_none(collector, odd):
    async with traced(collector) as (plane, spans):
        assert (await ask(plane, traceparent=odd)).status_code == 200
        *_, whole = await spans()
    assert whole.parent_span_id == b"" and whole.trace_id != b""


@pytest.mark.parametrize(("ratio", "flag"), [(0.0, "01"), (1.0, "00")])
async def test_what_is_not_sampled_makes_no_spans(collector, ratio, flag):
    """Neither what the ratio leaves out nor what the client does not trace."""
    async with traced(collector, ratio) as (plane, spans):
        await ask(plane, traceparent=f"00-{PARENT[0]}-{PARENT[1]}-{flag}")
        assert await spans() == []


async def test_failures_and_failovers_are_in_the_trace(collector, most):
    most[""] = 1
    async with traced(collector, num_engines=2, step_s=0.005) as (plane, spans):
        asked = asyncio.ensure_future(
            plane.http.post("/v1/completions", json={**BODY, "max_tokens": 50})
        )
        await plane.until(lambda: any(view.load.num_running for view in plane.view()))
        (busy,) = (view.engine_id for view in plane.view() if view.load.num_running)
        plane.links[busy].broken.set()
        most.clear()
        await asked
        plane.handle.failure = KeyError("no such thing")
        assert (await ask(plane)).status_code == 500
        moved, failed = (span for span in await spans() if span.kind == Span.SPAN_KIND_SERVER)
    assert [event.name for event in moved.events] == ["failover"]
    assert moved.status.code == Status.STATUS_CODE_UNSET
    assert failed.status.code == Status.STATUS_CODE_ERROR
    assert values_of(failed)["error.type"] == "server_error"
