"""The Serve deployment that speaks HTTP."""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve.context import _get_global_client
from starlette.types import ASGIApp

from deployments.backlog import BacklogLimits
from deployments.config import AppArgs, ModelOptions
from deployments.engine_client import EngineClient
from deployments.failover import FailoverLimits
from deployments.flags import missing_flags
from deployments.ingress.app import build_asgi_app
from deployments.ingress.draining import Draining
from deployments.ingress.journal import Journal
from deployments.ingress.logprob_budget import LogprobBudget
from deployments.ingress.message_style import MessageStyle
from deployments.ingress.metrics_page import ingress_samples
from deployments.ingress.options import IngressOptions
from deployments.ingress.response_cache import ResponseCache
from deployments.ingress.served import ServedModel, ServedModels
from deployments.load_table import load_table
from deployments.metrics import keep_publishing, lag_gauge
from deployments.moving import Mover
from deployments.observability.logs import Place, ProcessLog, configure_logging
from deployments.observability.options import TracingOptions
from deployments.trunk import TrunkHub
from deployments.watchdog import LoopLag
from engine.model_config import read_model_config
from engine.model_source import resolve_model
from engine.tokenizer import Tokenizer, has_tokenizer

if TYPE_CHECKING:
    from deployments.ingress.traces import Traces

logger = logging.getLogger("ray.serve")

MEMBERS_LIMIT_S = 1.0
"""Serve tells within this time which engines there are."""
TRUNKS_LIMIT_S = 10.0
"""An engine that runs opens its trunk within this time."""


class Ingress:
    """Validates, tokenizes, routes, detokenizes. Holds the trunks to all engines.

    Args:
        args: of the application.
        handles: served name → handle of its engines.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, args: AppArgs, handles: dict[str, Any]
    ) -> None:
        self._options = args.ingress
        place = Place("ingress", None, serve.get_replica_context().replica_id.unique_id)
        configure_logging(ProcessLog(args.logging, place))
        traces = _traces(args.tracing, place)
        self._draining = Draining()
        # Texts come one by one: for each, to wake the library's threads takes longer than it saves.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        failover = FailoverLimits(args.ingress.failover_tries, args.ingress.failover_timeout_s)
        hub = TrunkHub(f"ingress-{uuid.uuid4().hex[:12]}", load_table())
        self._mover = Mover(hub, load_table())
        lag = LoopLag("an ingress replica", lag_gauge("ingress"))
        self._lag_task = asyncio.create_task(lag.run())
        self._models = ServedModels(lag=lag)
        self._journal = Journal(args.logging.requests, traces, self._models.answers)
        for name, options in args.models.items():
            # `options` starts the handle's router, which learns at once what engines there are.
            handle = handles[name].options(method_name="generate")
            caching = options.engine.enable_prefix_caching
            client = EngineClient(handle, hub, load_table(), caching, failover)
            hub.follow(client.deployment)
            self._models.by_name[name] = await asyncio.to_thread(
                load_served_model, name, options, args.ingress, client
            )
        classes = await asyncio.to_thread(args.plugin_classes)  # imports them
        self._plugins = {name: plugin(name) for name, plugin in classes.items()}
        self._metrics_task = asyncio.create_task(
            keep_publishing(lambda: ingress_samples(self._models))
        )
        self._host = await asyncio.to_thread(_http_host)
        await _await_trunks(self._models)
        if missing := missing_flags():
            logger.warning(
                "Streaming will cost several times the CPU time it could: set %s before Ray "
                "starts, on every node (`python -m deployments.launch` does).",
                " ".join(missing),
            )

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Serve in the replica, after the constructor."""
        return build_asgi_app(
            self._models, self._options, self._draining, self._host, self._plugins, self._journal
        )

    async def drain(self) -> int:
        """Refuse requests from now on; returns how many are under way."""
        self._draining.ending = True
        return self._draining.num_running


def _traces(options: TracingOptions, place: Place) -> Traces | None:
    if options.otlp_endpoint is None:
        return None
    from deployments.ingress.traces import Traces  # imports OpenTelemetry

    return Traces(options, place)


def _http_host() -> str | None:
    """The host that Serve's HTTP servers listen on; Serve has no public way to ask."""
    host: str | None = _get_global_client().http_config.host
    return host


async def _await_trunks(models: ServedModels) -> None:
    """Where engines run already, as in an update of the ingress, wait for the trunks to them: this
    process gets requests as soon as it is done, and would have to refuse them."""
    begin = time.monotonic()
    for model in models.by_name.values():
        client = model.client
        while not model.ready:
            known = bool(client.table.members(client.deployment))
            if time.monotonic() - begin > (TRUNKS_LIMIT_S if known else MEMBERS_LIMIT_S):
                break
            await asyncio.sleep(0.02)


def load_served_model(
    name: str, options: ModelOptions, ingress: IngressOptions, client: EngineClient
) -> ServedModel:
    """What an ingress knows of a model: its tokenizer, its limits, and how its requests are run.

    Raises:
        ConfigError: the model is not there, or an option does not fit it.
    """
    source = resolve_model(options.engine.model)
    shape = read_model_config(source)
    scaling = options.deployment.autoscaling
    tokenizer = Tokenizer.load(source) if has_tokenizer(source) else None
    if tokenizer is not None and (template := options.own_chat_template()) is not None:
        tokenizer.chat_template = template
    return ServedModel(
        name=name,
        tokenizer=tokenizer,
        max_model_len=options.engine.resolve_max_model_len(shape.max_position_embeddings),
        vocab_size=shape.vocab_size,
        client=client,
        max_concurrent_requests=ingress.max_concurrent_requests,
        retry_after_s=ingress.retry_after_s,
        backlog_limits=BacklogLimits(
            options.deployment.max_queued_tokens, options.deployment.max_estimated_wait_s
        ),
        may_scale_to_zero=scaling is not None and scaling.min_replicas == 0,
        style=MessageStyle.of(
            tokenizer, options.tool_call_parser, options.reasoning_parser, options.response_role
        ),
        allow_request_chat_templates=ingress.allow_request_chat_templates,
        hidden_size=shape.hidden_size,
        pooling=options.pooling,
        logprobs=LogprobBudget(options.deployment.max_logprobs_under_way),
        cache=ResponseCache(ingress.response_cache_bytes),
        created=int(time.time()),
    )


IngressASGI = serve.ingress()(Ingress)
"""The class that Serve deploys."""
