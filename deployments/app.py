"""Builds the Serve application: `serve run deployments.app:build model=smollm2-135m-instruct`."""

# Serve looks at the annotation of `build` itself, so annotations must not become strings here.
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from deployments.config import (
    AppArgs,
    Autoscaling,
    DeploymentOptions,
    ModelOptions,
    deployment_name,
)
from deployments.engine_actor import StartCore
from deployments.engine_replica import EngineReplica
from deployments.ingress.app import check_plugin_paths
from deployments.ingress.deployment import IngressASGI
from deployments.ingress.options import IngressOptions
from deployments.names import INGRESS
from deployments.observability.options import LoggingOptions
from deployments.ranks import start_ranked_engine
from deployments.routing import EngineRouter
from deployments.watchdog import WatchOptions
from engine.config import EngineConfig

_SERVE_FIELDS = {"min_replicas", "initial_replicas", "max_replicas", "metrics_interval_s"}
"""Options of `Autoscaling` that Serve heeds; the others are the policy's."""
REPLICA_CPUS = 0.1
"""An engine replica only passes requests on."""
AUTOSCALING_POLICY = "cluster.autoscaling:ScaleByLoad"
"""Named, not imported: Serve imports it where the application is built, and the deployments stand
without the cluster's tools."""
LOOK_BACK_INTERVALS = 3
"""Reports that Serve averages the number of requests without an engine over."""
START_TRIES = 3
"""Starts that may fail before the deployment counts as failed; most failures are lasting ones, such
as a broken checkpoint, and each try loads a model. (Serve's default is 20.)"""
INGRESS_CHECK_S = 1.0
"""How often Serve looks whether an ingress replica lives; it replaces one that has died when it
looks. With Serve's 10 s, requests would wait that long where there is only one."""
INGRESS_CHECK_LIMIT_S = 10.0
"""An ingress replica that does not answer within this time three times in a row is replaced."""
SHUTDOWN_POLL_S = 0.5
"""How often a replica that shuts down looks whether its requests have ended; Serve's 2 s would be
the least time that an idle one takes."""


def build(args: AppArgs) -> serve.Application:
    """Build the application.

    Raises:
        ConfigError: a model is not there, or an option does not fit it.
    """
    return compose(args, start_ranked_engine)


def compose(args: AppArgs, start_core: StartCore) -> serve.Application:
    """Build the application around a core of choice.

    Args:
        args: of the application.
        start_core: makes the engine's core in the engine actor.

    Raises:
        ConfigError: a model is not there, or an option does not fit it.
    """
    args = args.check()
    check_plugin_paths(args.plugin_classes().values())
    engines = {
        name: _engine_app(name, options, args.logging, start_core)
        for name, options in args.models.items()
    }
    return _ingress_deployment(args.ingress).bind(args, engines)


def _engine_app(
    name: str, model: ModelOptions, logging: LoggingOptions, start_core: StartCore
) -> serve.Application:
    options, engine = model.deployment, model.engine
    ranks = engine.tensor_parallel_size
    resources = engine_resources(engine, options, has_gpus())
    share = {name: amount / ranks for name, amount in resources.items()}
    deployment = serve.deployment(EngineReplica).options(
        name=deployment_name(name),
        ray_actor_options={"num_cpus": REPLICA_CPUS},
        placement_group_bundles=[{"CPU": REPLICA_CPUS}, *[share] * ranks],
        # All of an engine's GPUs on one node: tensor parallelism over Ethernet is no use.
        placement_group_strategy="STRICT_PACK",
        max_constructor_retry_count=START_TRIES,
        max_ongoing_requests=options.max_ongoing_requests or 2 * engine.max_num_seqs,
        max_queued_requests=options.max_queued_requests,
        graceful_shutdown_wait_loop_s=SHUTDOWN_POLL_S,
        graceful_shutdown_timeout_s=options.graceful_shutdown_timeout_s,
        health_check_period_s=options.health_check_period_s,
        health_check_timeout_s=options.health_check_timeout_s,
        request_router_config=RequestRouterConfig(
            request_router_class=EngineRouter,
            request_router_kwargs={
                "policy": options.routing_policy,
                "margin": options.cache_affinity_margin,
            },
        ),
        **_size(options.num_replicas, options.autoscaling),
    )
    actor_options = {
        "num_cpus": share.get("CPU", 0),
        "num_gpus": share.get("GPU", 0),
        "resources": {k: v for k, v in share.items() if k not in ("CPU", "GPU")},
    }
    watch = WatchOptions(options.stall_limit_s, options.crash_dump_dir)
    return deployment.bind(name, engine, actor_options, start_core, watch, logging)


def _ingress_deployment(options: IngressOptions) -> serve.Deployment:
    return serve.deployment(IngressASGI).options(
        name=INGRESS,
        num_replicas=options.num_replicas,
        ray_actor_options={"num_cpus": options.num_cpus},
        # The ingress itself refuses what is too much, with an answer that clients understand.
        max_ongoing_requests=2 * options.max_concurrent_requests,
        graceful_shutdown_wait_loop_s=SHUTDOWN_POLL_S,
        graceful_shutdown_timeout_s=options.graceful_shutdown_timeout_s,
        health_check_period_s=INGRESS_CHECK_S,
        health_check_timeout_s=INGRESS_CHECK_LIMIT_S,
    )


def _size(num_replicas: int, scaling: Autoscaling | None) -> dict[str, Any]:
    if scaling is None:
        return {"num_replicas": num_replicas}
    config = AutoscalingConfig(
        **scaling.model_dump(include=_SERVE_FIELDS, exclude_none=True),
        look_back_period_s=LOOK_BACK_INTERVALS * scaling.metrics_interval_s,
        policy=AutoscalingPolicy(
            policy_function=AUTOSCALING_POLICY,
            policy_kwargs=scaling.model_dump(exclude=_SERVE_FIELDS),
        ),
        upscale_delay_s=0,  # the policy has delays of its own
        downscale_delay_s=0,
    )
    return {"autoscaling_config": config}


def engine_resources(
    engine: EngineConfig, options: DeploymentOptions, has_gpus: bool
) -> dict[str, float]:
    """What an engine, all its ranks together, takes of a node; resources of zero are left out.

    Args:
        engine: options of the engine.
        options: of its deployment.
        has_gpus: whether there are GPUs where it is to run.
    """
    num_gpus = options.num_gpus
    if num_gpus is None:
        on_gpu = engine.device == "cuda" or (engine.device == "auto" and has_gpus)
        num_gpus = engine.tensor_parallel_size if on_gpu else 0
    resources = {"CPU": options.num_cpus, "GPU": num_gpus}
    if options.accelerator_type:
        # Nodes with an accelerator offer one unit of this; the rest is how Ray names its type.
        resources[f"accelerator_type:{options.accelerator_type}"] = 0.001
    return {name: amount for name, amount in resources.items() if amount}


def has_gpus() -> bool:
    """Whether the cluster (before there is one: this machine) has a GPU."""
    if ray.is_initialized():
        return bool(ray.cluster_resources().get("GPU", 0) > 0)
    return any(Path("/dev").glob("nvidia[0-9]*"))
