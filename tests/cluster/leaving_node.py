"""A cluster of `ray start`, of which the node that serves gets SIGTERM, as a pod does.

`python -m tests.cluster.leaving_node DRAIN_S TOKENS` prints what became of the streams of so many
tokens that were under way, as JSON.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from deployments.flags import EVERY_NODE
from deployments.haproxy import haproxy_settings
from deployments.launch import SIDE_PORTS
from deployments.leftovers import adopt_orphans, end_descendants
from deployments.ports import pick_port
from tests.cluster.documents import ROOT

STREAMS = 6
STEP_S = 0.05
CPUS = 2
MODEL = "smollm2-135m-instruct"


def main() -> None:
    drain_s, tokens = sys.argv[1], int(sys.argv[2])
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    os.environ.clear()
    os.environ.update(kept | EVERY_NODE | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"})
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    os.environ["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = drain_s
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    adopt_orphans()
    folder = Path(tempfile.mkdtemp(prefix="tl-"))
    try:
        print(json.dumps(leave(folder, tokens)))
    finally:
        end_descendants(0.0)
        shutil.rmtree(folder, ignore_errors=True)


def leave(folder: Path, tokens: int) -> dict[str, Any]:
    """Serve on the first worker, start a second one, and have the first leave."""
    gcs, http = pick_port(), pick_port()
    environment = node_environment(folder / "head")
    head = ("--head", f"--port={gcs}", "--num-cpus=0", "--include-dashboard=false")
    start_node(environment, *head, f"--temp-dir={folder}/ray")
    os.environ.update(environment)  # Ray reads it when it is imported
    import ray

    time.sleep(5)
    ray.init(address=f"127.0.0.1:{gcs}", namespace="serve", log_to_driver=False)
    join = (f"--address=127.0.0.1:{gcs}", f"--num-cpus={CPUS}")
    first = start_node(node_environment(folder / "first"), *join)
    wait_for_cpus(CPUS, first)
    serve_here(http)
    second = start_node(node_environment(folder / "second"), *join)
    wait_for_cpus(2 * CPUS, second)
    with ThreadPoolExecutor(STREAMS) as pool:
        streams = [pool.submit(stream, http, tokens) for _ in range(STREAMS)]
        time.sleep(2)
        first.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        got = [running.result() for running in streams]
        first.wait()
    return {"tokens": got, "left_after_s": time.monotonic() - begin, "later": stream(http, 8)}


def node_environment(folder: Path) -> dict[str, str]:
    """What nodes that share a machine must not share."""
    folder.mkdir()
    return haproxy_settings(folder) | {name: str(pick_port()) for name in SIDE_PORTS}


def start_node(environment: Mapping[str, str], *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *words]
    command += ["--object-store-memory=100000000", f"--dashboard-agent-listen-port={pick_port()}"]
    return subprocess.Popen(command, env={**os.environ, **environment}, stdout=sys.stderr)


def wait_for_cpus(count: int, node: subprocess.Popen[bytes]) -> None:
    """Return when the node has joined; the cluster has so many CPUs then."""
    import ray

    while ray.cluster_resources().get("CPU", 0) < count:
        if node.poll() is not None:
            raise RuntimeError("a node did not start")
        time.sleep(0.5)


def serve_here(port: int) -> None:
    """Serve a fake engine where there is room, and wait until it answers."""
    from ray import serve

    from benchmarks.serving.fake.core import StartFakeEngine
    from deployments.app import compose
    from deployments.config import AppArgs

    engine = {"device": "cpu", "num_kvcache_blocks": 4000, "async_scheduling": True}
    args = AppArgs.model_validate({"model": MODEL, "engine": engine})
    serve.start(proxy_location="EveryNode", http_options={"host": "127.0.0.1", "port": port})
    serve.run(compose(args, StartFakeEngine(STEP_S)))
    while not is_ready(port):
        time.sleep(0.5)


def is_ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ready", timeout=10).status_code == 200
    except httpx.HTTPError:
        return False


def stream(port: int, tokens: int) -> int | str:
    """How many tokens came until the stream's proper end, or what went wrong."""
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": tokens, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    url = f"http://127.0.0.1:{port}/v1/completions"
    try:
        with httpx.stream("POST", url, json=body, timeout=60) as response:
            lines = [line for line in response.iter_lines() if line]
    except httpx.HTTPError as error:
        return repr(error)
    if len(lines) < 2 or lines[-1] != "data: [DONE]":
        return f"{response.status_code}: {lines[-1:]}"
    return int(json.loads(lines[-2].removeprefix("data: "))["usage"]["completion_tokens"])


if __name__ == "__main__":
    main()
