"""Serves a fake engine through the whole serve plane until its input ends or it is interrupted.

    python -m benchmarks.serving.fake --step-ms 25

Ingress, routing, trunk, engine actor, scheduler, prefix cache, HAProxy and flags are those that are
shipped; only the model and its device are not there. Prints a line of JSON once it is ready.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

from benchmarks.models import BUNDLED_MODEL, find_model
from benchmarks.serving.fake.core import (
    BATCHED_TOKENS,
    BLOCK_SIZE,
    TOTAL_BLOCKS,
    StartFakeEngine,
)
from benchmarks.serving.nodes import CPUS, NodePool
from deployments.config import AppArgs
from deployments.flags import FAST_PATH
from deployments.launch import SIDE_PORTS, Plan, environment, is_ready
from deployments.leftovers import adopt_orphans, end_descendants
from deployments.placement import POLICIES
from deployments.ports import pick_port

_ROOT = Path(__file__).parents[3]
_NAME = "fake"
"""The served model's name."""
_START_LIMIT_S = 120.0
_END_LIMIT_S = 10.0
_OBJECT_STORE_BYTES = 200 * 2**20


def main(words: list[str] | None = None) -> None:
    """Run the server."""
    options = _parse(words)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray shows the logs of its processes there
    folder = Path(tempfile.mkdtemp(prefix="tl-"))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    adopt_orphans()
    try:
        _serve(options, folder, answers)
    except KeyboardInterrupt:
        pass
    except Exception:
        traceback.print_exc()  # now: Ray may end this process once its own have ended
        raise
    finally:
        end_descendants(_END_LIMIT_S)
        shutil.rmtree(folder, ignore_errors=True)


def _serve(options: argparse.Namespace, folder: Path, answers: IO[str]) -> None:
    """Start Ray and the application, tell that they are ready, and wait for the end."""
    plan = Plan(folder, "127.0.0.1", options.port or pick_port(), _NAME)
    os.environ.update({name: str(pick_port()) for name in SIDE_PORTS})
    os.environ.update(environment(plan, folder))
    paths = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    for name in FAST_PATH if options.flags == "default" else ():
        os.environ[name] = "0"
    import ray  # reads the flags when it is imported
    from ray import serve

    from benchmarks.serving.fake.collect import collecting

    ray.init(
        address="local",
        num_cpus=4
        + max(options.engines, options.max_engines or 0)
        + options.ingresses * (1 + CPUS),
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
        namespace="serve",
        _node_ip_address=options.ip,
        _temp_dir=str(folder),
    )
    serve.start(
        proxy_location="HeadOnly" if options.nodes else "EveryNode",  # they share this host's ports
        http_options={"host": plan.host, "port": plan.port, "keep_alive_timeout_s": 90},
    )
    journal = options.journal or folder / "journal"
    journal.mkdir(parents=True, exist_ok=True)
    start_core = StartFakeEngine(options.step_ms / 1e3, options.token_us / 1e6, journal)
    with _more_nodes(options, ray.get_runtime_context().gcs_address):
        _deploy(options, start_core)
        _wait_until_ready(plan)
        ready = _ready_line(options, plan, journal)
        with collecting(options.collect_s) if options.collect_s else nullcontext():
            print(json.dumps(ready), file=answers, flush=True)
            for line in sys.stdin:  # options that change
                vars(options).update(json.loads(line))
                _deploy(options, start_core)
                print("{}", file=answers, flush=True)
        serve.shutdown()
    ray.shutdown()


def _deploy(options: argparse.Namespace, start_core: StartFakeEngine) -> None:
    from ray import serve

    from deployments.app import compose

    app = compose(_app_args(options), start_core)
    serve.run(app, logging_config={"enable_access_log": False})


@contextmanager
def _more_nodes(options: argparse.Namespace, address: str) -> Iterator[None]:
    """Have room for the engines on nodes of their own, if asked for."""
    if not options.nodes:
        yield
        return
    engines_each = math.ceil(options.engines / options.nodes)
    pool = NodePool(
        address, options.nodes, engines_each, options.replace_nodes_s, options.namespace
    )
    try:
        with pool.kept():
            yield
    finally:
        pool.end()


def _ready_line(options: argparse.Namespace, plan: Plan, journal: Path) -> dict[str, Any]:
    return {
        **vars(options),
        "tokenizer": options.model,
        "model": _NAME,
        "block_size": BLOCK_SIZE,
        "url": plan.url,
        "pid": os.getpid(),
        "journal": str(journal),
    }


def _app_args(options: argparse.Namespace) -> AppArgs:
    engine: dict[str, Any] = {
        "model": options.model if options.model == BUNDLED_MODEL else find_model(options.model),
        "load_format": "auto" if options.model == BUNDLED_MODEL else "dummy",
        "device": "cpu",
        "max_num_seqs": options.max_num_seqs,
        "max_num_batched_tokens": options.max_num_batched_tokens,
        "kvcache_block_size": BLOCK_SIZE,
        "num_kvcache_blocks": options.cache_tokens // BLOCK_SIZE + 1,  # one is the null block
        "async_scheduling": True,
    }
    deployment = {
        "num_replicas": options.engines,
        "autoscaling": _scaling(options),
        "num_cpus": 0.1,
        "num_gpus": 1 if options.nodes else 0,  # which only the other nodes pretend to have
        "routing_policy": options.routing_policy,
        "max_ongoing_requests": options.max_ongoing_requests,
        "max_queued_requests": options.max_queued_requests,
        "max_queued_tokens": options.max_queued_tokens,
        "max_estimated_wait_s": options.max_estimated_wait_s,
        "graceful_shutdown_timeout_s": options.drain_s,
    }
    ingress = {
        "num_replicas": options.ingresses,
        "num_cpus": 1 + CPUS if options.nodes else 0.1,
        "max_concurrent_requests": options.max_concurrent_requests,
        "graceful_shutdown_timeout_s": options.drain_s,
    }
    models = {_NAME: {"engine": engine, "deployment": deployment}}
    return AppArgs.model_validate({"models": models, "ingress": ingress})


def _scaling(options: argparse.Namespace) -> dict[str, Any] | None:
    """How the number of engines follows the load, if there may be more than at the start."""
    if options.max_engines is None:
        return None
    return {
        "min_replicas": options.engines,
        "max_replicas": options.max_engines,
        "target_ttft_s": options.target_ttft_s,
        "downscale_delay_s": options.downscale_delay_s,
    }


def _wait_until_ready(plan: Plan) -> None:
    deadline = time.monotonic() + _START_LIMIT_S
    while not is_ready(plan):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the server was not ready within {_START_LIMIT_S:.0f} s")
        time.sleep(0.2)


def _pair(text: str) -> tuple[str, str]:
    name, _, ip = text.partition(":")
    return name, ip


def _parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.serving.fake", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--step-ms", type=float, default=25.0, help="time of an engine's step")
    parser.add_argument("--token-us", type=float, default=0.0, help="added for a token of prefill")
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--max-engines", type=int, help="scale with the load, from `--engines` up")
    parser.add_argument("--target-ttft-s", type=float, default=2.0)
    parser.add_argument("--downscale-delay-s", type=float, default=300.0)
    parser.add_argument("--ingresses", type=int, default=1)
    parser.add_argument(
        "--nodes", type=int, default=0, help="of the cluster beside this one, for all engines"
    )
    parser.add_argument(
        "--replace-nodes-s", type=float, default=5.0, help="from a node's death to another"
    )
    parser.add_argument("--ip", help="of the head node, where others reach it")
    parser.add_argument(
        "--namespace",
        type=_pair,
        metavar="NAME:IP",
        help="network namespace of one of the other nodes, and its address there",
    )
    parser.add_argument("--max-num-seqs", type=int, default=1024, help="rows of an engine's step")
    parser.add_argument("--max-num-batched-tokens", type=int, default=BATCHED_TOKENS)
    parser.add_argument("--cache-tokens", type=int, default=(TOTAL_BLOCKS - 1) * BLOCK_SIZE)
    parser.add_argument("--max-ongoing-requests", type=int, help="of an engine")
    parser.add_argument("--max-queued-requests", type=int, default=1024, help="of an ingress")
    parser.add_argument("--max-queued-tokens", type=int, help="of the engine with the fewest")
    parser.add_argument("--max-estimated-wait-s", type=float, help="for a first token")
    parser.add_argument("--max-concurrent-requests", type=int, default=1024, help="of an ingress")
    parser.add_argument("--drain-s", type=float, default=1.0, help="for requests in an update")
    parser.add_argument("--routing-policy", choices=tuple(POLICIES), default="prefix_load")
    parser.add_argument("--model", default=BUNDLED_MODEL, help="whose tokenizer is used")
    parser.add_argument(
        "--flags",
        choices=("fast", "default"),
        default="fast",
        help="those of docs/serving.md, or Ray Serve's defaults",
    )
    parser.add_argument(
        "--collect-s", type=float, help="seconds between collections of garbage in all processes"
    )
    parser.add_argument("--port", type=int, default=0, help="any free one if unset")
    parser.add_argument("--journal", type=Path, help="folder for accounts of the steps")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
