"""`/metrics`: what an ingress replica knows, in Prometheus' text format.

https://prometheus.io/docs/instrumenting/exposition_formats, version 0.0.4. The same goes through
Ray, which exports it on each node; see `deployments/metrics.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from starlette.requests import Request
from starlette.responses import Response

from deployments.ingress.served import ServedModel, ServedModels
from deployments.samples import FAMILIES, Labels, Sample, engine_samples

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


async def handle_metrics(models: ServedModels, request: Request, data: bytes) -> Response:
    """The load of all engines, and what this process has counted of its requests."""
    samples = [*_engines_samples(models), *ingress_samples(models)]
    if models.lag is not None:
        labels = {"process": "ingress", **_name_of(models)}
        samples.append(Sample("event_loop_lag_seconds", models.lag.worst_s, labels))
    return Response(page(samples), headers={"Content-Type": CONTENT_TYPE})


def ingress_samples(models: ServedModels) -> Iterator[Sample]:
    """What this process has counted."""
    labels = _name_of(models)
    yield from models.answers.samples(labels)
    for model in models.by_name.values():
        yield from _model_samples(model, {"model_name": model.name, **labels})


def page(samples: Iterable[Sample]) -> str:
    """The text of samples; those of a family stand together."""
    lines = {
        family: [f"# HELP trunkline_{family} {says}", f"# TYPE trunkline_{family} {kind}"]
        for family, (kind, says) in FAMILIES.items()
    }
    for sample in samples:
        lines[sample.family].append(_line(sample))
    return "\n".join(line for each in lines.values() for line in each) + "\n"


def _engines_samples(models: ServedModels) -> Iterator[Sample]:
    for model in models.by_name.values():
        for view in model.client.table.view(model.client.deployment):
            labels = {"model_name": model.name, "engine": view.engine_id}
            yield from engine_samples(view.load, labels)


def _model_samples(model: ServedModel, labels: Labels) -> Iterator[Sample]:
    views = model.client.table.view(model.client.deployment)
    yield Sample("num_engines", sum(map(model.is_served_by, views)), labels)
    held = model.client.table.num_held(model.client.deployment)
    yield Sample("num_requests_held", held, labels)
    yield Sample("scales_to_zero", int(model.may_scale_to_zero), labels)
    yield Sample("response_cache_queries_total", model.cache.num_queries, labels)
    yield Sample("response_cache_hits_total", model.cache.num_hits, labels)
    yield Sample("response_cache_bytes", model.cache.num_bytes, labels)
    yield from model.counts.samples(labels)


def _name_of(models: ServedModels) -> dict[str, str]:
    """The label by which this process is told from others behind the same address."""
    for model in models.by_name.values():
        return {"ingress": model.client.hub.subscriber_id}
    return {}


def _line(sample: Sample) -> str:
    written = ",".join(f'{key}="{_escape(text)}"' for key, text in sample.labels.items())
    return f"trunkline_{sample.family}{sample.suffix}{{{written}}} {sample.value}"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
