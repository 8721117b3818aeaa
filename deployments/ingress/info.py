"""`/v1/models` and `/health`."""

from __future__ import annotations

from math import isfinite
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from deployments.ingress.errors import json_response
from deployments.ingress.served import ServedModel, ServedModels
from deployments.load_table import EngineView


async def handle_models(models: ServedModels, request: Request, data: bytes) -> Response:
    """List the served models."""
    return json_response(
        {"object": "list", "data": [_describe(model) for model in models.by_name.values()]}
    )


async def handle_model(models: ServedModels, request: Request, data: bytes) -> Response:
    """Describe one model."""
    return json_response(_describe(models.find(request.path_params["model_id"])))


async def handle_health(models: ServedModels, request: Request, data: bytes) -> Response:
    """200 when every model has an engine, else 503; with the load of each engine."""
    engines = [
        _engine(model.name, view)
        for model in models.by_name.values()
        for view in model.client.table.view(model.client.deployment)
    ]
    waiting = [
        model.name
        for model in models.by_name.values()
        if not model.ready and not model.may_scale_to_zero
    ]
    status = "starting" if waiting else "ok"
    answer: dict[str, Any] = {"status": status, "engines": engines}
    if waiting:
        answer["without_engine"] = waiting
    return json_response(answer, 503 if waiting else 200)


def _describe(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "trunkline",
        "root": model.name,
        "max_model_len": model.max_model_len,
    }


def _engine(model: str, view: EngineView) -> dict[str, Any]:
    return {
        "id": view.engine_id,
        "model": model,
        "running": view.load.num_running,
        "waiting": view.load.num_waiting,
        "booked": view.num_booked,
        "free_blocks": view.load.free_blocks,
        "total_blocks": view.load.total_blocks,
        "steps": view.load.step,
        "estimated_wait_s": _finite(view.estimated_wait_s),
        "age_s": None if view.age_s is None else round(view.age_s, 3),
    }


def _finite(seconds: float) -> float | None:
    """Rounded; None for a wait without an end, which JSON cannot say."""
    return round(seconds, 3) if isfinite(seconds) else None
