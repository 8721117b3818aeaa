"""`/v1/models`, `/version`, and what those ask who watch over the server: `/health`, `/ready`."""

from __future__ import annotations

from functools import cache
from importlib import metadata
from math import isfinite
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from deployments.ingress.errors import json_response, unavailable
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
    """200 from every ingress that lives, engines or not: a new one would not find any either.

    `status` is `ok` when `/ready` would be 200, else `unready`.
    """
    rows = [
        _engine(model, view)
        for model in models.by_name.values()
        for view in model.client.table.view(model.client.deployment)
    ]
    waiting = [model.name for model in models.by_name.values() if not model.can_serve]
    answer: dict[str, Any] = {"status": "unready" if waiting else "ok", "engines": rows}
    if waiting:
        answer["without_engine"] = waiting
    if models.lag is not None:
        answer["event_loop_lag_s"] = round(models.lag.worst_s, 3)
    return json_response(answer)


async def handle_ready(models: ServedModels, request: Request, data: bytes) -> Response:
    """200 when requests to every model would be served now.

    Raises:
        ApiError: 503 when a model has no engine that serves.
    """
    waiting = [model for model in models.by_name.values() if not model.can_serve]
    if waiting:
        names = ", ".join(f"'{model.name}'" for model in waiting)
        raise unavailable(f"No engine of {names} is ready.", waiting[0].retry_after_s)
    return json_response({"status": "ready"})


async def handle_version(models: ServedModels, request: Request, data: bytes) -> Response:
    """Tell which release this is."""
    return json_response({"version": _version()})


@cache
def _version() -> str:
    try:
        return metadata.version("trunkline")
    except metadata.PackageNotFoundError:  # run from its source, without having been installed
        return "unknown"


def _describe(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "trunkline",
        "root": model.name,
        "max_model_len": model.max_model_len,
    }


def _engine(model: ServedModel, view: EngineView) -> dict[str, Any]:
    return {
        "id": view.engine_id,
        "model": model.name,
        "serving": model.is_served_by(view),
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
