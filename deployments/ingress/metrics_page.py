"""`/metrics`: what an ingress replica knows, in Prometheus' text format.

https://prometheus.io/docs/instrumenting/exposition_formats, version 0.0.4. Ray exports more, on
each node; see `deployments/metrics.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate

from starlette.requests import Request
from starlette.responses import Response

from deployments.ingress.request_counts import Histogram
from deployments.ingress.served import ServedModel, ServedModels
from engine.outputs import EngineLoad

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Labels = Mapping[str, str]

_ENGINE = {
    "num_requests_running": ("gauge", "Requests in the running batch."),
    "num_requests_waiting": ("gauge", "Requests that wait for admission."),
    "kv_cache_usage_perc": ("gauge", "Share of KV blocks in use, from 0 to 1."),
    "kv_cache_free_blocks": ("gauge", "KV blocks that a new request could take."),
    "num_preemptions_total": ("counter", "Requests pushed out and recomputed."),
    "prefix_cache_queries_total": ("counter", "Prompt tokens looked up."),
    "prefix_cache_hits_total": ("counter", "Prompt tokens found in the prefix cache."),
}
_INGRESS = {
    "prompt_tokens_total": ("counter", "Prompt tokens of requests that have ended."),
    "response_cache_queries_total": ("counter", "Prompts looked up in the response cache."),
    "response_cache_hits_total": ("counter", "Prompts answered from the response cache."),
    "response_cache_bytes": ("gauge", "Memory that the response cache takes."),
    "generation_tokens_total": ("counter", "Tokens generated for requests that have ended."),
    "request_success_total": ("counter", "Completions that have ended."),
    "time_to_first_token_seconds": ("histogram", "Time to the first token."),
    "e2e_request_latency_seconds": ("histogram", "Time to the last token."),
    "request_time_per_output_token_seconds": ("histogram", "Time between tokens, by request."),
}


class Page:
    """Gathers samples by metric, whose lines must stand together."""

    def __init__(self) -> None:
        self._lines = {
            name: [f"# HELP trunkline_{name} {says}", f"# TYPE trunkline_{name} {kind}"]
            for name, (kind, says) in (_ENGINE | _INGRESS).items()
        }

    def add(self, name: str, value: float, labels: Labels) -> None:
        """A sample of a gauge or counter."""
        self._lines[name].append(_line(name, value, labels))

    def add_histogram(self, name: str, histogram: Histogram, labels: Labels) -> None:
        """The samples of a histogram."""
        counts = list(accumulate(histogram.counts))
        for bound, count in zip([*histogram.bounds, "+Inf"], counts, strict=True):
            line = _line(f"{name}_bucket", count, {**labels, "le": str(bound)})
            self._lines[name].append(line)
        self._lines[name].append(_line(f"{name}_sum", histogram.total, labels))
        self._lines[name].append(_line(f"{name}_count", counts[-1], labels))

    def text(self) -> str:
        """The whole page."""
        return "\n".join(line for lines in self._lines.values() for line in lines) + "\n"


async def handle_metrics(models: ServedModels, request: Request, data: bytes) -> Response:
    """The load of all engines, and what this process has counted of its requests."""
    page = Page()
    for model in models.by_name.values():
        for view in model.client.table.view(model.client.deployment):
            labels = {"model_name": model.name, "engine": view.engine_id}
            for name, value in _engine_values(view.load):
                page.add(name, value, labels)
        _add_counts(page, model)
    return Response(page.text(), headers={"Content-Type": CONTENT_TYPE})


def _engine_values(load: EngineLoad) -> Iterator[tuple[str, float]]:
    used = 1 - load.free_blocks / load.total_blocks if load.total_blocks else 0.0
    yield "num_requests_running", load.num_running
    yield "num_requests_waiting", load.num_waiting
    yield "kv_cache_usage_perc", used
    yield "kv_cache_free_blocks", load.free_blocks
    yield "num_preemptions_total", load.num_preemptions
    yield "prefix_cache_queries_total", load.prefix_queries
    yield "prefix_cache_hits_total", load.prefix_hits


def _add_counts(page: Page, model: ServedModel) -> None:
    counts = model.counts
    labels = {"model_name": model.name, "ingress": model.client.hub.subscriber_id}
    page.add("prompt_tokens_total", counts.prompt_tokens, labels)
    page.add("response_cache_queries_total", model.cache.num_queries, labels)
    page.add("response_cache_hits_total", model.cache.num_hits, labels)
    page.add("response_cache_bytes", model.cache.num_bytes, labels)
    page.add("generation_tokens_total", counts.generation_tokens, labels)
    for reason in ("stop", "length", "abort", "error"):
        ended = {**labels, "finished_reason": reason}
        page.add("request_success_total", counts.ended[reason], ended)
    page.add_histogram("time_to_first_token_seconds", counts.first_token_s, labels)
    page.add_histogram("e2e_request_latency_seconds", counts.latency_s, labels)
    page.add_histogram("request_time_per_output_token_seconds", counts.token_s, labels)


def _line(name: str, value: float, labels: Labels) -> str:
    written = ",".join(f'{key}="{_escape(text)}"' for key, text in labels.items())
    return f"trunkline_{name}{{{written}}} {value}"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
