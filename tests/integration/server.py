"""A Trunkline server of its own on this machine, in a process that takes commands on stdin.

Ray Serve reads its flags when it is imported and Ray's processes inherit them, so each set of flags
needs a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from deployments.ports import pick_port

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 120
HOST = "127.0.0.1"
NODE_MEMORY = 100 * 2**20
"""Bytes of a node's object store."""


class Server:
    """Starts `python -m tests.integration.server` and talks to it.

    `nodes` are the resources of further nodes, as `Cluster.add_node` takes them; the proxy is then
    on the head alone, as all share this host's ports.
    """

    def __init__(
        self,
        *,
        fast_path: bool,
        args: dict[str, Any],
        fake: dict[str, Any] | None,
        nodes: Sequence[dict[str, Any]] = (),
    ):
        self._folder = Path(tempfile.mkdtemp(prefix="tl-"))
        self.port, *others = (pick_port() for _ in range(5))
        self.url = f"http://127.0.0.1:{self.port}"
        spec = {"port": self.port, "folder": str(self._folder), "args": args, "fake": fake}
        spec["nodes"] = list(nodes)
        self._log = (self._folder / "server.log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.server", json.dumps(spec)],
            cwd=ROOT,
            env=self._environment(fast_path, others),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )
        try:
            self._answer()
        except BaseException:
            self.stop()
            raise

    def _environment(self, fast_path: bool, ports: list[int]) -> dict[str, str]:
        sys.path.insert(0, str(ROOT))
        from deployments.flags import FAST_PATH, SERVE_MIDDLEWARE
        from deployments.haproxy import haproxy_settings

        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        kept |= FAST_PATH if fast_path else {}
        kept |= haproxy_settings(self._folder) | SERVE_MIDDLEWARE
        kept |= {
            "PYTHONPATH": str(ROOT),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports[0]),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(ports[1]),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports[2]),
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(ports[3]),
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_raylet_start_wait_time_s": "120",
            "OMP_NUM_THREADS": "1",
        }
        return kept

    def call(self, command: str, **more: Any) -> Any:
        """Run a command of `COMMANDS` in the server's driver process."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"command": command, **more}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise RuntimeError(f"the server ended; its log:\n{self.log()[-6000:]}")

    def log(self) -> str:
        """What the driver and, through it, Ray's workers wrote."""
        return (self._folder / "server.log").read_text()

    def stop(self) -> None:
        """End the server and everything that it started."""
        if self._process.poll() is None and self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(10)
        self._log.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def main() -> None:
    """Start Ray and the application, then obey until stdin ends."""
    import ray
    from ray import serve

    spec = json.loads(sys.argv[1])
    cluster = _start_ray(spec)
    serve.start(
        proxy_location="HeadOnly" if cluster else None,
        http_options={"host": HOST, "port": spec["port"]},
    )
    _deploy(spec, spec["args"])
    _await_ready(spec["port"])
    print("ANSWER null", flush=True)
    commands = {
        **COMMANDS,
        "deploy": partial(_deploy, spec),
        "end_node": partial(_end_node, cluster),
        "add_node": partial(_add_node, cluster),
    }
    for line in sys.stdin:
        request = json.loads(line)
        answer = commands[request.pop("command")](**request)
        print("ANSWER", json.dumps(answer), flush=True)
    serve.shutdown()
    ray.shutdown()
    if cluster is not None:
        cluster.shutdown()


def _start_ray(spec: dict[str, Any]) -> Any:
    """Start Ray and connect to it; returns the `Cluster` if there is more than one node."""
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 8, "object_store_memory": NODE_MEMORY, "include_dashboard": False}
    if not spec["nodes"]:
        ray.init(address="local", _temp_dir=spec["folder"], namespace="serve", **head)
        return None
    head_args = {**head, "temp_dir": spec["folder"], "node_ip_address": HOST}
    cluster = Cluster(initialize_head=True, head_node_args=head_args)
    for node in spec["nodes"]:
        _add_node(cluster, node)
    ray.init(address=cluster.address, namespace="serve")
    return cluster


def _add_node(cluster: Any, node: dict[str, Any]) -> str:
    """Returns the id of the new node."""
    added = cluster.add_node(object_store_memory=NODE_MEMORY, node_ip_address=HOST, **node)
    return str(added.node_id)


def _end_node(cluster: Any, node_id: str) -> None:
    """End a node as a machine ends that loses its power."""
    (node,) = [node for node in cluster.worker_nodes if node.node_id == node_id]
    cluster.remove_node(node, allow_graceful=False)


def _deploy(spec: dict[str, Any], args: dict[str, Any]) -> None:
    """Run the application, or bring it to other arguments."""
    from ray import serve

    from deployments.app import build, compose
    from deployments.config import AppArgs
    from tests.deployments.fake_core import FakeCore

    checked, fake = AppArgs(**args), spec["fake"]
    serve.run(build(checked) if fake is None else compose(checked, partial(FakeCore, **fake)))


def _await_ready(port: int) -> None:
    """Serve is done when the ingress runs; a proxy and the engines' first reports come later."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _engine_pids() -> dict[str, int]:
    """Engine id → process id of its engine actor."""
    return _pids("EngineActor")


def _pids(class_name: str) -> dict[str, int]:
    """Actor name → process id, of living actors whose class name contains `class_name`."""
    import ray

    states = ray._private.state.actors().values()
    return {
        state["Name"]: state["Pid"]
        for state in states
        if class_name in state["ActorClassName"] and state["State"] == "ALIVE"
    }


def _places(class_name: str) -> dict[str, str]:
    """Actor name → node id, of the same."""
    import ray

    states = ray._private.state.actors().values()
    return {
        state["Name"]: state["Address"]["NodeID"]
        for state in states
        if class_name in state["ActorClassName"] and state["State"] == "ALIVE"
    }


def _address() -> str:
    """Where other processes reach the cluster."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


def _metrics() -> str:
    """What Ray exports on this node."""
    import ray

    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=5) as response:
        return str(response.read().decode())


def _details() -> str:
    """What Serve tells the dashboard of the application."""
    from ray.serve.context import _get_global_client

    return json.dumps(_get_global_client().get_serve_details(), default=str)


COMMANDS = {
    "address": _address,
    "details": _details,
    "metrics": _metrics,
    "engine_pids": _engine_pids,
    "pids": _pids,
    "places": _places,
}

if __name__ == "__main__":
    main()
