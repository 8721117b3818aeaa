"""The ASGI application of an ingress replica."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.routing import Route, compile_path
from starlette.types import ASGIApp

from deployments.api_keys import KeySource
from deployments.ingress.bodies import Bodies
from deployments.ingress.chat import handle_chat
from deployments.ingress.completions import handle_completion
from deployments.ingress.draining import DrainGate, Draining
from deployments.ingress.embeddings import handle_embeddings
from deployments.ingress.errors import handle_http_exception
from deployments.ingress.exchange import Endpoint
from deployments.ingress.gate import OPEN_PATHS, Gate, KeyLimits, is_loopback
from deployments.ingress.info import (
    handle_health,
    handle_model,
    handle_models,
    handle_ready,
    handle_version,
)
from deployments.ingress.journal import Journal
from deployments.ingress.metrics_page import handle_metrics
from deployments.ingress.openapi import handle_openapi
from deployments.ingress.options import IngressOptions
from deployments.ingress.plugged import PluggedProtocol
from deployments.ingress.request_counts import AnswerCounts
from deployments.ingress.responses import handle_responses
from deployments.ingress.served import ServedModels
from deployments.ingress.simple import (
    handle_batch_generate,
    handle_generate,
    handle_generate_stream,
)
from deployments.ingress.tokens import handle_detokenize, handle_tokenize
from deployments.plugins.loading import PluginClass
from deployments.plugins.serving_engine import ServingEngine
from engine.errors import ConfigError

ModelsHandler = Callable[[ServedModels, Request, bytes], Awaitable[ASGIApp]]

ROUTES: tuple[tuple[str, str, ModelsHandler], ...] = (
    ("POST", "/v1/completions", handle_completion),
    ("POST", "/v1/chat/completions", handle_chat),
    ("POST", "/v1/responses", handle_responses),
    ("POST", "/v1/embeddings", handle_embeddings),
    ("POST", "/completions", handle_completion),
    ("POST", "/chat/completions", handle_chat),
    ("POST", "/embeddings", handle_embeddings),
    ("POST", "/tokenize", handle_tokenize),
    ("POST", "/detokenize", handle_detokenize),
    ("GET", "/v1/models", handle_models),
    ("GET", "/v1/models/{model_id:path}", handle_model),
    ("GET", "/health", handle_health),
    ("GET", "/ready", handle_ready),
    ("GET", "/ping", handle_ready),
    ("POST", "/ping", handle_ready),
    ("GET", "/version", handle_version),
    ("GET", "/metrics", handle_metrics),
    ("GET", "/openapi.json", handle_openapi),
    ("POST", "/generate", handle_generate),
    ("POST", "/generate_stream", handle_generate_stream),
    ("POST", "/batch_generate", handle_batch_generate),
)


def build_asgi_app(
    models: ServedModels,
    options: IngressOptions,
    draining: Draining | None = None,
    host: str | None = None,
    plugins: Mapping[str, ServingEngine[Any]] | None = None,
    journal: Journal | None = None,
    asks_for_keys: bool = True,
) -> Starlette:
    """Make the application that serves these models.

    Args:
        models: to serve.
        options: of the ingress.
        draining: counts the requests, and can have them refused.
        host: that the server listens on, if it is known.
        plugins: served name → plug-in, of the models that have one.
        journal: tells of requests; by default of those alone that fail by the server's fault.
        asks_for_keys: False lets everybody in, whatever API keys there are.

    Raises:
        ConfigError: there is something wrong with the API keys.
    """
    journal = journal or Journal(answers=models.answers)
    bodies = Bodies(options.max_body_bytes, options.max_held_body_bytes, options.body_timeout_s)
    routes = []
    for method, path, handler in ROUTES:
        # Whoever comes without a key must not take room for bodies.
        reads_body = method == "POST" and path not in OPEN_PATHS
        endpoint = Endpoint(partial(handler, models), bodies, journal, reads_body)
        routes.append(Route(path, endpoint, methods=[method]))
    for path, protocol in _plugged(models, plugins or {}).items():
        routes.append(Route(path, Endpoint(protocol, bodies, journal), methods=["POST"]))
    keys = options.key_source() if asks_for_keys else None
    app = Starlette(
        routes=routes,
        middleware=_middleware(options, keys, draining or Draining(), host, models.answers),
        exception_handlers={HTTPException: handle_http_exception},
        lifespan=partial(_closing, journal),
    )
    app.router.redirect_slashes = False  # or hosts that clients name would come back to them
    return app


@asynccontextmanager
async def _closing(journal: Journal, app: Starlette) -> AsyncIterator[None]:
    """Serve ends this when the last request is answered, and then kills the process."""
    yield
    await asyncio.to_thread(journal.close)


def check_plugin_paths(classes: Iterable[PluginClass]) -> None:
    """Make sure that plug-ins answer for nobody else: some paths are open without a key.

    Raises:
        ConfigError: the path of one is taken, or could be read as one that is, or the other way.
    """
    taken = {path: (re.compile(re.escape(path)), "the server") for _, path, _ in ROUTES}
    for plugin in dict.fromkeys(classes):
        try:
            pattern, _, _ = compile_path(plugin.path)
        except (AssertionError, ValueError) as error:
            raise ConfigError(f"the path of {plugin.__name__} is wrong: {error}.") from None
        for path, (others, owner) in taken.items():
            if pattern.fullmatch(path) or others.fullmatch(plugin.path):
                raise ConfigError(
                    f"{plugin.__name__} wants the path {plugin.path}, but {path} is that of "
                    f"{owner}; set another."
                )
        taken[plugin.path] = pattern, plugin.__name__


def _plugged(
    models: ServedModels, plugins: Mapping[str, ServingEngine[Any]]
) -> dict[str, PluggedProtocol]:
    by_path: dict[str, dict[str, ServingEngine[Any]]] = {}
    for name, plugin in plugins.items():
        by_path.setdefault(plugin.path, {})[name] = plugin
    return {path: PluggedProtocol(models, those) for path, those in by_path.items()}


def _middleware(
    options: IngressOptions,
    keys: KeySource | None,
    draining: Draining,
    host: str | None,
    answers: AnswerCounts,
) -> list[Middleware]:
    """What a request passes first. Nothing here touches the messages of a stream, but what a
    browser gets, whose pages are named in the options."""
    key_limits = KeyLimits(
        options.max_concurrent_requests_per_key, options.requests_per_minute_per_key
    )
    # Elsewhere than on the loopback an open server is called by names that only its users know.
    hosts = options.allowed_hosts if keys is None and is_loopback(host or "") else None
    gates = [
        Middleware(DrainGate, draining, answers),
        Middleware(Gate, keys, key_limits, hosts, answers),
    ]
    if not options.cors_allow_origins:
        return gates
    cors = Middleware(
        CORSMiddleware,
        allow_origins=options.cors_allow_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["Retry-After", "X-Cache", "X-Request-ID"],
    )
    # A browser's question whether it may ask carries no key, and it shows pages no answer without
    # these headers, refusals included.
    return [cors, *gates]
