"""How the launcher picks ports, and learns that the server is ready, or never will be."""

from __future__ import annotations

import random
import re
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest

from deployments.launch import (
    SIDE_PORTS,
    Plan,
    _ready_text,
    _show,
    check_port_free,
    environment,
    is_ready,
)
from deployments.ports import PICKED, bind
from engine.errors import ConfigError


class Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"status": "ok"}')

    def log_message(self, *_: object) -> None:
        pass


def test_readiness_is_asked_without_a_proxy(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with HTTPServer(("127.0.0.1", 0), Health) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        plan = Plan(Path("serve_config.yaml"), "127.0.0.1", server.server_port, "m")
        server.timeout = 5
        ready = is_ready(plan)
        thread.join()
    assert ready
    assert not is_ready(plan)


class Server6(HTTPServer):
    address_family = socket.AF_INET6


def has_ipv6() -> bool:
    try:
        bind("::1", 0)
    except OSError:  # as in many containers
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


@needs_ipv6
@pytest.mark.parametrize("host", ["::1", "::"])
def test_ipv6_hosts_give_a_url_that_can_be_asked(host):
    with Server6((host, 0), Health) as server:
        server.timeout = 5
        plan = Plan(Path("serve_config.yaml"), host, server.server_port, "m")
        assert plan.url == f"http://[::1]:{server.server_port}"
        assert f"curl -N {plan.url}/v1/chat/completions " in _ready_text(plan, 1.0)
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert httpx.get(f"{plan.url}/health", trust_env=False).json() == {"status": "ok"}
        thread.join()


@needs_ipv6
def test_ipv6_hosts_are_named_with_their_port():
    plan = Plan(Path("serve_config.yaml"), "::1", 1, "m")
    with Server6(("::1", 0), Health) as server:
        plan = replace(plan, port=server.server_port)
        with pytest.raises(ConfigError, match=re.escape(f"listen on [::1]:{plan.port} (")):
            check_port_free(plan)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("llm.example.com", "http://llm.example.com:8000"),
        ("fd00::1", "http://[fd00::1]:8000"),
    ],
)
def test_url_of_other_hosts(host, url):
    assert Plan(Path("serve_config.yaml"), host, 8000, "m").url == url


@pytest.mark.parametrize(
    ("line", "given_up"),
    [
        (
            b"(ServeController pid=1) ERROR now serve 1 -- Failed to update the deployments ['E'].",
            1,
        ),
        (b"(ServeController pid=1) ERROR now serve 1 -- Deploying app 't' failed with", 1),
        (b"(ServeController pid=1) ERROR now serve 1 -- A replica failed to start.", 0),
        (b"(EngineActor pid=1) ERROR -- Failed to update the deployments", 0),
    ],
)
def test_launcher_hears_that_serve_has_given_up(line, given_up, capfdbinary):
    heard = threading.Event()
    _show([line + b"\n"], heard)
    assert heard.is_set() == bool(given_up)


def test_launcher_shows_the_servers_own_lines_and_not_serves_progress(capfdbinary):
    own = b"(EngineActor pid=1) 2026-11-22T02:00:00.000Z INFO engine m: the engine is ready\n"
    progress = b"(ServeController pid=1) INFO 2026-11-22 02:00:00,000 controller 1 -- Deploying\n"
    _show([own, progress], threading.Event())
    assert capfdbinary.readouterr().out == own


PICK = """
import sys
from deployments.launch import SIDE_PORTS, Plan, environment
from pathlib import Path
plan = Plan(Path("serve_config.yaml"), "127.0.0.1", 1, "m")
SIDE_PORTS.clear()
SIDE_PORTS["PORT"] = int(sys.argv[1])
print(environment(plan, Path(sys.argv[2]))["PORT"], flush=True)
sys.stdin.read()
"""


def test_launchers_that_start_at_once_pick_different_ports(tmp_path, monkeypatch):
    """Before the HAProxy of either listens."""
    port = random.choice(PICKED)
    monkeypatch.setattr("deployments.launch.SIDE_PORTS", {"PORT": port})
    plan = Plan(Path("serve_config.yaml"), "127.0.0.1", 1, "m")
    with subprocess.Popen(
        [sys.executable, "-c", PICK, str(port), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        lines = iter(other.stdout.readline, "")
        assert any(line == f"{port}\n" for line in lines)  # after a remark on a missing HAProxy
        assert environment(plan, tmp_path)["PORT"] != str(port)
        other.communicate()
    assert environment(plan, tmp_path)["PORT"] == str(port)  # the other has ended


def test_ports_that_the_environment_sets_stay(tmp_path, monkeypatch):
    (name, *_) = SIDE_PORTS
    monkeypatch.setenv(name, "12345")
    plan = Plan(Path("serve_config.yaml"), "127.0.0.1", 1, "m")
    assert environment(plan, tmp_path)[name] == "12345"
