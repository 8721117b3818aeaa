"""The ASGI application of an ingress replica."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp

from deployments.ingress.chat import handle_chat
from deployments.ingress.completions import handle_completion
from deployments.ingress.errors import handle_http_exception
from deployments.ingress.exchange import Endpoint
from deployments.ingress.info import handle_health, handle_model, handle_models
from deployments.ingress.served import ServedModels
from deployments.ingress.simple import (
    handle_batch_generate,
    handle_generate,
    handle_generate_stream,
)

ModelsHandler = Callable[[ServedModels, Request, bytes], Awaitable[ASGIApp]]

ROUTES: tuple[tuple[str, str, ModelsHandler], ...] = (
    ("POST", "/v1/completions", handle_completion),
    ("POST", "/v1/chat/completions", handle_chat),
    ("GET", "/v1/models", handle_models),
    ("GET", "/v1/models/{model_id:path}", handle_model),
    ("GET", "/health", handle_health),
    ("POST", "/generate", handle_generate),
    ("POST", "/generate_stream", handle_generate_stream),
    ("POST", "/batch_generate", handle_batch_generate),
)


def build_asgi_app(models: ServedModels, max_body_bytes: int) -> Starlette:
    """Make the application that serves these models."""
    routes = [
        Route(path, Endpoint(partial(handler, models), max_body_bytes), methods=[method])
        for method, path, handler in ROUTES
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: handle_http_exception})
