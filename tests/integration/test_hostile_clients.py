"""Clients that want in, want too much or never finish, through HAProxy and a real Ray cluster."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from pathlib import Path

import grpc
import httpx
import openai
import psutil
import pytest

from tests.integration.server import Server

pytestmark = pytest.mark.integration

SECRET = "sk-integration-secret"
HEAD = (
    "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    f"Authorization: Bearer {SECRET}\r\n"
)
ARGS = {"model": "smollm2-135m-instruct"}
LIMITS = {"body_timeout_s": 3, "max_body_bytes": 2**20, "cors_allow_origins": ["https://a.example"]}
GRPC_METHODS = ("/ray.serve.ASGIService/HandleRequest", "/ray.rpc.CoreWorkerService/PushTask")
"""What takes pickled arguments: of Serve's replicas, and of any actor."""


@pytest.fixture(scope="module")
def server():
    os.environ["TRUNKLINE_API_KEYS"] = SECRET
    try:
        started = Server(fast_path=True, args={**ARGS, "ingress": LIMITS}, fake={"step_s": 0.01})
    finally:
        del os.environ["TRUNKLINE_API_KEYS"]
    try:
        yield started
    finally:
        started.stop()


def raw(server: Server, head: bytes, body: Iterable[bytes] = ()) -> bytes:
    """Send bytes as they are, as many as the server takes, and read all that it answers."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        answer = b""
        try:
            connection.sendall(head)
            for part in body:
                connection.sendall(part)
        except OSError:
            pass  # it was cut off, but not before it was answered
        try:
            while part := connection.recv(65536):
                answer += part
                if b"\r\n\r\n" in answer and b"onnection: close" not in answer:
                    return answer
        except OSError:
            pass
        return answer


def processes(server: Server, name: str) -> list[psutil.Process]:
    root = psutil.Process(server._process.pid)
    return [p for p in root.children(recursive=True) if name in " ".join(p.cmdline())]


def test_keys_open_the_server_and_are_written_nowhere(server):
    url = f"{server.url}/v1"
    asked = {"model": ARGS["model"], "prompt": "hi", "max_tokens": 2}
    for key in ("wrong", f"{SECRET}x"):
        with pytest.raises(openai.AuthenticationError) as caught:
            openai.OpenAI(base_url=url, api_key=key, max_retries=0).completions.create(**asked)
        assert caught.value.code == "invalid_api_key"
    client = openai.OpenAI(base_url=url, api_key=SECRET, max_retries=0)
    assert client.completions.create(**asked).usage.completion_tokens == 2
    with pytest.raises(openai.NotFoundError):
        client.completions.create(**{**asked, "model": "none"})
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert SECRET not in server.call("details")
    written = [path for path in Path(server._folder).rglob("*") if path.is_file()]
    assert len(written) > 10
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]


def test_browsers_may_ask_before_they_send_a_key(server):
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    response = httpx.options(f"{server.url}/v1/completions", headers=asked)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://a.example"


def test_an_announced_body_is_refused_before_it_is_sent(server):
    answer = raw(server, f"{HEAD}Content-Length: 1000000000\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("authorization", [SECRET, "wrong"])
def test_an_endless_body_is_cut_off_and_kept_nowhere(server, authorization):
    watched = [*processes(server, "ray::ServeReplica"), *processes(server, "haproxy")]
    before = [process.memory_info().rss for process in watched]
    head = HEAD.replace(SECRET, authorization) + "Transfer-Encoding: chunked\r\n\r\n"
    part = b"186a0\r\n" + b" " * 100_000 + b"\r\n"
    answer = raw(server, head.encode(), (part for _ in range(3000)))
    assert answer[:13] in (b"HTTP/1.1 413 ", b"HTTP/1.1 401 ")
    after = [process.memory_info().rss for process in watched]
    assert max(a - b for a, b in zip(after, before, strict=True)) < 50 * 2**20


def test_a_slow_body_ends_with_408(server):
    answer = raw(server, f"{HEAD}Content-Length: 100\r\n\r\n{{".encode())
    assert answer.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    "header",
    [
        *("x-request-id", "serve_multiplexed_model_id", "x-session-id", "traceparent"),
        *("x-request-timeout-seconds", "x-request-disconnect-disabled", "x", "cookie"),
    ],
)
def test_odd_headers_are_no_error_of_the_server(server, header):
    for value in (b"\xff\xfe", b"y" * 14_000, b"y" * 40_000, b"\x01"):
        head = HEAD.encode() + header.encode() + b": " + value + b"\r\nContent-Length: 2\r\n\r\n{}"
        answer = raw(server, head)
        assert answer.startswith(b"HTTP/1.1 4"), (value[:2], answer)


def test_http_is_on_the_loopback_alone_and_the_rest_wants_rays_token(server):
    """All that is on other addresses is Ray's, where a pickled argument would be run."""
    assert processes(server, "haproxy")
    refused = {}
    for process in [*processes(server, "ray::"), *processes(server, "haproxy")]:
        for entry in process.net_connections("tcp"):
            if entry.status != psutil.CONN_LISTEN or entry.laddr.ip in ("127.0.0.1", "::1"):
                continue
            name, port = process.cmdline()[0], entry.laddr.port
            assert name.startswith("ray::"), name
            assert not speaks_api(port), name
            refused.setdefault(name, set()).update(grpc_answers(port))
    engines = {n for n in refused if n.startswith(("ray::ServeReplica", "ray::EngineActor"))}
    assert len(engines) == 3
    assert all("UNAUTHENTICATED" in refused[name] for name in engines)
    assert "OK" not in set().union(*refused.values())


def speaks_api(port: int) -> bool:
    try:
        return "engines" in httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).json()
    except (httpx.HTTPError, ValueError):
        return False


def grpc_answers(port: int) -> set[str]:
    """The codes of calls without Ray's token."""
    codes = set()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for method in GRPC_METHODS:
            try:
                channel.unary_unary(method)(b"", timeout=5)
                codes.add("OK")
            except grpc.RpcError as error:
                codes.add(error.code().name)
    return codes


@pytest.mark.slow  # it waits for HAProxy's ten seconds
def test_headers_that_never_end_end_with_408(server):
    answer = raw(server, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_the_server_is_as_before(server):
    """The last test of this module."""
    state = httpx.get(f"{server.url}/health").json()
    assert state["status"] == "ok"
    assert all(e["running"] == e["waiting"] == e["booked"] == 0 for e in state["engines"])
