"""How the launcher learns that the server is ready, or never will be."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from deployments.launch import Plan, _show, is_ready


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
