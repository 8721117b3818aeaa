"""`trunkline check`: what a configuration would start, and whether it fits."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from deployments.app import REPLICA_CPUS, engine_resources, has_gpus
from deployments.cli.fit import Item, Resources, free_resources, place
from deployments.cli.settings import read_settings
from deployments.config import AppArgs, DeploymentOptions, ModelOptions, deployment_name
from deployments.ingress.app import check_plugin_paths
from deployments.names import INGRESS
from deployments.ports import address
from deployments.serve_config import parse_values
from engine.options import Options

GIB = 2**30


def run(options: argparse.Namespace) -> int:
    """Print what would be started; returns the exit status.

    Raises:
        ConfigError: it could not be started.
        CommandError: there is no cluster at the address.
    """
    path, values, _ = read_settings(options)
    checked = parse_values(values, path)
    args = checked.check()
    plugins = args.plugin_classes()
    check_plugin_paths(plugins.values())
    gpu_bytes = None if options.gpu_memory is None else int(options.gpu_memory * GIB)
    knows_gpu = gpu_bytes is not None or has_gpus()  # asks this machine, and later the cluster
    nodes = None if options.address is None else free_resources(options.address)
    on_gpus = gpu_bytes is not None or has_gpus()
    lines = [f"{path}: listens on {address(checked.host, checked.port)}"]
    for name, model in args.models.items():
        needs = engine_resources(model.engine, model.deployment, on_gpus)
        lines += ["", name, *_model_lines(name, model, needs)]
        if name in plugins:
            lines.append(_row("plug-in", f"{plugins[name].__name__} at {plugins[name].path}"))
        if needs.get("GPU") and not knows_gpu:
            lines.append(_row("memory", "no GPU on this machine; give --gpu-memory GIB"))
        else:
            lines += _memory_lines(model, bool(needs.get("GPU")), gpu_bytes)
    lines += ["", "ingress", *_ingress_lines(args), "", "all processes", *_watch_lines(args)]
    if nodes is not None:
        lines += ["", f"cluster at {options.address}", *_cluster_lines(args, on_gpus, nodes)]
    print("\n".join(lines))
    return 0


def _model_lines(name: str, model: ModelOptions, needs: Resources) -> Iterator[str]:
    yield _row("model", model.engine.model)
    yield _row("deployment", deployment_name(name))
    yield _row("replicas", _replicas(model.deployment))
    yield _row("each takes", f"{_amounts(needs)}; {_amounts({'CPU': REPLICA_CPUS})} beside it")
    yield _row("engine", _changed(model.engine, but="model"))


def _memory_lines(model: ModelOptions, on_gpu: bool, gpu_bytes: int | None) -> Iterator[str]:
    from engine import plan_memory  # imports torch

    engine = model.engine if on_gpu else model.engine.model_copy(update={"device": "cpu"})
    plan = plan_memory(engine, gpu_bytes if on_gpu else None)
    most = "at most " if plan.device == "cuda" else ""
    yield _row("weights", f"{_gib(plan.weight_bytes)} of {plan.dtype} on {plan.device}")
    yield _row("KV cache", f"{most}{_gib(plan.cache_bytes)}")
    yield _row("", f"{plan.num_blocks:,} blocks of {plan.block_size} tokens")
    yield _row("holds", f"{most}{plan.num_full_sequences:,} × {plan.max_model_len:,} tokens")


def _ingress_lines(args: AppArgs) -> Iterator[str]:
    ingress = args.ingress
    yield _row("replicas", str(ingress.num_replicas))
    yield _row("each takes", _amounts({"CPU": ingress.num_cpus}))
    yield _row(
        "API keys", "asked for" if ingress.has_keys else "none: whoever reaches it is served"
    )


def _watch_lines(args: AppArgs) -> Iterator[str]:
    yield _row("logging", _changed(args.logging))
    traced = args.tracing.otlp_endpoint is not None
    yield _row("tracing", _changed(args.tracing) if traced else "none")


def _changed(options: Options, but: str = "") -> str:
    """What was asked for of some options, apart from `but`."""
    values = options.model_dump(exclude_defaults=True, exclude={but})
    return ", ".join(f"{name}={value}" for name, value in values.items()) or "all defaults"


def _cluster_lines(args: AppArgs, on_gpus: bool, nodes: dict[str, Resources]) -> Iterator[str]:
    items = [
        Item(f"{INGRESS} {index}", {"CPU": args.ingress.num_cpus})
        for index in range(1, args.ingress.num_replicas + 1)
    ]
    for name, model in args.models.items():
        needs = dict(engine_resources(model.engine, model.deployment, on_gpus))
        needs["CPU"] = needs.get("CPU", 0.0) + REPLICA_CPUS
        count = _first_replicas(model.deployment)
        items += [Item(f"{deployment_name(name)} {i}", needs) for i in range(1, count + 1)]
    places = place(items, nodes)
    for item in items:
        node = places[item.name]
        where = f"on {node}" if node else f"waits for {_amounts(item.needs)} on one node"
        yield f"  {item.name}: {where}"


def _first_replicas(options: DeploymentOptions) -> int:
    scaling = options.autoscaling
    if scaling is None:
        return options.num_replicas
    first = scaling.initial_replicas
    return scaling.min_replicas if first is None else first


def _replicas(options: DeploymentOptions) -> str:
    scaling = options.autoscaling
    if scaling is None:
        return str(options.num_replicas)
    return f"{_first_replicas(options)}, later {scaling.min_replicas} to {scaling.max_replicas}"


def _amounts(resources: Resources) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in resources.items()) or "nothing"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def _row(key: str, value: str) -> str:
    return f"  {key:<12}{value}"
