"""What is refused before a body is read: wrong keys, too many requests, long headers and bodies."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from ray._common.utils import import_attr

from deployments.api_keys import KEY_VARIABLES
from deployments.flags import SERVE_MIDDLEWARE
from deployments.ingress.gate import MAX_HEADER_BYTES, MAX_HEADERS, KeyUse
from deployments.ingress.options import IngressOptions
from tests.deployments.exchange import Exchange
from tests.deployments.plane import open_plane

COMPLETION = {"model": "m", "prompt": "hi", "max_tokens": 2}
SECRET = "sk-secret"
BEARER = {"Authorization": f"Bearer {SECRET}"}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in KEY_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
async def closed(monkeypatch):
    monkeypatch.setenv("TRUNKLINE_API_KEYS", SECRET)
    async with open_plane() as opened:
        yield opened


def error_of(response: httpx.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert SECRET not in response.text and SECRET not in str(response.headers)
    return error


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", "Bearer wrong", f"Basic {SECRET}", SECRET, f"Bearer {SECRET}x"],
)
async def test_without_the_right_key_everything_but_health_is_closed(closed, authorization):
    headers = {} if authorization is None else {"Authorization": authorization}
    for method, path in (
        ("POST", "/v1/completions"),
        ("POST", "/generate"),
        ("GET", "/v1/models"),
        ("GET", "/nowhere"),
        ("GET", "/health/"),
        ("GET", "/v1/models/health"),
        ("OPTIONS", "/v1/completions"),
    ):
        response = await closed.http.request(method, path, headers=headers)
        assert response.status_code == 401, path
        assert response.headers["www-authenticate"] == "Bearer"
        assert error_of(response)["code"] == "invalid_api_key"
    assert (await closed.http.get("/health", headers=headers)).status_code == 200


async def test_the_right_key_opens(closed):
    for scheme in ("Bearer", "bearer"):
        headers = {"Authorization": f"{scheme} {SECRET}"}
        response = await closed.http.post("/v1/completions", json=COMPLETION, headers=headers)
        assert response.status_code == 200
    assert (await closed.http.get("/nowhere", headers=BEARER)).status_code == 404


@pytest.mark.parametrize(
    ("header", "value", "closes"),
    [
        ("Content-Length", "99999", False),
        ("Content-Length", "100000", True),
        ("Transfer-Encoding", "chunked", True),
    ],
)
async def test_a_wrong_key_is_refused_before_the_body_is_read(closed, header, value, closes):
    exchange = Exchange(closed.app, {"Authorization": "Bearer wrong", header: value})
    await asyncio.wait_for(exchange.task, 5)
    assert (exchange.status, exchange.num_received) == (401, 0)
    assert (exchange.headers.get("connection") == "close") == closes


@pytest.mark.parametrize("common", [True, False])
async def test_requests_under_way_of_a_key_are_bounded(tmp_path, common):
    keys = tmp_path / "keys"
    keys.write_text(f"{SECRET} name=alice" + " max_concurrent_requests=2" * (not common) + "\nb")
    keys.chmod(0o600)
    limit = 2 if common else 1000
    options = IngressOptions(api_keys_file=str(keys), max_concurrent_requests_per_key=limit)
    async with open_plane(options=options) as plane:
        running = [Exchange(plane.app, BEARER) for _ in range(2)]
        await asyncio.sleep(0)
        response = await plane.http.post("/v1/completions", json=COMPLETION, headers=BEARER)
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        error = error_of(response)
        assert error["code"] == "rate_limit_exceeded" and "'alice' may have 2" in error["message"]
        other = {"Authorization": "Bearer b"}
        response = await plane.http.post("/v1/completions", json=COMPLETION, headers=other)
        assert response.status_code == 200
        running[0].feed(json.dumps(COMPLETION).encode(), more=False)
        await running[0].task
        running[1].task.cancel()
        await asyncio.wait((running[1].task,))
        for _ in range(3):
            response = await plane.http.post("/v1/completions", json=COMPLETION, headers=BEARER)
            assert response.status_code == 200


async def test_the_rate_of_a_key_is_bounded(monkeypatch):
    take = KeyUse.take_token  # at a time that stands still
    monkeypatch.setattr(KeyUse, "take_token", lambda use, rate, now: take(use, rate, 100.0))
    monkeypatch.setenv("TRUNKLINE_API_KEYS", f"{SECRET},b")
    options = IngressOptions(requests_per_minute_per_key=3)
    async with open_plane(options=options) as plane:
        for _ in range(3):
            assert (await plane.http.get("/v1/models", headers=BEARER)).status_code == 200
        response = await plane.http.get("/v1/models", headers=BEARER)
        assert (response.status_code, error_of(response)["code"]) == (429, "rate_limit_exceeded")
        assert response.headers["retry-after"] == "20"
        other = {"Authorization": "Bearer b"}
        assert (await plane.http.get("/v1/models", headers=other)).status_code == 200


def test_token_bucket_holds_a_minute_and_fills_evenly():
    use = KeyUse()
    assert [use.take_token(2, 100.0) for _ in range(3)] == [0, 0, 30]
    assert use.take_token(2, 129.0) == pytest.approx(1)
    assert use.take_token(2, 130.0) == 0
    assert use.take_token(2, 130.0) == pytest.approx(30)
    assert [use.take_token(2, 1e6) for _ in range(3)] == [0, 0, 30]
    assert [KeyUse().take_token(0.5, 5.0)] == [0]
    slow = KeyUse()
    assert [slow.take_token(0.5, 5.0), slow.take_token(0.5, 5.0)] == [0, 120]


async def test_serve_sees_no_headers_that_it_cannot_read():
    seen: list[Any] = []

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["headers"])

    (middleware,) = import_attr(*SERVE_MIDDLEWARE.values())()
    app = middleware.cls(serve, *middleware.args, **middleware.kwargs)
    headers = [(b"x-request-id", b"\xff"), (b"accept", b"*/*"), (b"user-agent", "é".encode())]
    await app({"type": "http", "headers": headers}, None, None)
    assert seen == [[(b"accept", b"*/*")]]


async def test_too_many_or_too_long_headers(plane):
    for headers in (
        {f"x-{i}": "" for i in range(MAX_HEADERS + 1)},
        {"x": "y" * MAX_HEADER_BYTES},
    ):
        exchange = Exchange(plane.app, headers)
        await asyncio.wait_for(exchange.task, 5)
        assert (exchange.status, exchange.code) == (431, "headers_too_large")
        assert exchange.num_received == 0
    response = await plane.http.get("/v1/models?" + "x" * MAX_HEADER_BYTES)
    assert response.status_code == 431


@pytest.mark.parametrize("length", ["100001", "9" * 30])
async def test_a_body_announced_too_long_is_refused_unread(plane, length):
    exchange = Exchange(plane.app, {"Content-Length": length})
    await asyncio.wait_for(exchange.task, 5)
    assert (exchange.status, exchange.code) == (413, "body_too_large")
    assert (exchange.num_received, exchange.headers["connection"]) == (0, "close")


async def test_a_body_that_grows_too_long_is_read_no_further(plane):
    exchange = Exchange(plane.app, {"Transfer-Encoding": "chunked"})
    for _ in range(30):
        exchange.feed(b" " * 10_000, more=True)
    await asyncio.wait_for(exchange.task, 5)
    assert (exchange.status, exchange.num_received) == (413, 11)


async def test_bodies_that_are_held_are_bounded_together():
    options = IngressOptions(max_body_bytes=1024, max_held_body_bytes=8 * 1024)
    async with open_plane(options=options) as plane:
        waiting = [Exchange(plane.app, {}) for _ in range(8)]
        for exchange in waiting:
            exchange.feed(b" " * 1024, more=True)
        await asyncio.sleep(0)
        refused = Exchange(plane.app, {})
        refused.feed(b" ", more=True)
        await asyncio.wait_for(refused.task, 5)
        assert (refused.status, refused.code) == (429, "server_overloaded")
        assert (refused.headers["connection"], refused.headers["retry-after"]) == ("close", "1")
        # Places are given back by who is refused, leaves, is cut off, or has been answered.
        waiting[0].feed(b" ", more=True)
        waiting[1].leave()
        waiting[2].task.cancel()
        waiting[3].feed(b"", more=False)
        await asyncio.wait([exchange.task for exchange in waiting[:4]], timeout=5)
        assert (waiting[0].status, waiting[3].status) == (413, 400)
        again = [Exchange(plane.app, {}) for _ in range(5)]
        for exchange in again:
            exchange.feed(b" " * 1024, more=True)
        done, _ = await asyncio.wait([exchange.task for exchange in again], timeout=0.1)
        assert done == {again[4].task} and again[4].status == 429
        for exchange in (*waiting, *again):
            exchange.task.cancel()


async def test_bodies_of_answers_that_have_begun_take_no_room():
    options = IngressOptions(max_body_bytes=1024, max_held_body_bytes=1024)
    async with open_plane(options=options, step_s=0.002) as plane:
        body = {**COMPLETION, "max_tokens": 200, "stream": True, "user": "x" * 600}
        streams = [Exchange(plane.app, {}) for _ in range(3)]
        for stream in streams:
            stream.may_send.clear()
            stream.feed(json.dumps(body).encode(), more=False)
            await plane.until(lambda: stream.sent)  # noqa: B023
            assert stream.status == 200 and not stream.task.done()
        for stream in streams:
            stream.leave()
            await stream.task


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/ping"), ("GET", "/ping"), ("GET", "/health"), ("GET", "/v1/models")],
)
async def test_what_needs_no_body_waits_for_none(plane, method, path):
    """Or slow bodies to paths that are open without a key would keep out those who have one."""
    exchange = Exchange(plane.app, {"Transfer-Encoding": "chunked"}, path, method)
    for _ in range(30):
        exchange.feed(b" " * 10_000, more=True)
    await asyncio.wait_for(exchange.task, 5)
    assert exchange.status == 200


async def test_a_slow_body_ends_with_408():
    options = IngressOptions(body_timeout_s=0.05)
    async with open_plane(options=options) as plane:
        slow = Exchange(plane.app, {"Content-Length": "100"})
        slow.feed(b'{"model"', more=True)
        silent = Exchange(plane.app, {})
        for exchange in (slow, silent):
            await asyncio.wait_for(exchange.task, 5)
            assert (exchange.status, exchange.code) == (408, "body_too_slow")
            assert exchange.headers["connection"] == "close"
        # The limit is the body's, not the answer's.
        long = {**COMPLETION, "max_tokens": 200}
        assert (await plane.http.post("/v1/completions", json=long)).status_code == 200


ASK = {"Origin": "https://chat.example.com", "Access-Control-Request-Method": "POST"}


async def test_browsers_are_told_nothing_by_default(plane):
    response = await plane.http.options("/v1/completions", headers=ASK)
    assert response.status_code == 405
    response = await plane.http.post("/v1/completions", json=COMPLETION, headers=ASK)
    for name in ("/health", "/v1/models"):
        response = await plane.http.get(name, headers=ASK)
        assert not [header for header in response.headers if header.startswith("access-control")]


async def test_browsers_ask_without_a_key_and_then_send_it(monkeypatch):
    monkeypatch.setenv("TRUNKLINE_API_KEYS", SECRET)
    options = IngressOptions(cors_allow_origins=["https://chat.example.com"])
    async with open_plane(options=options) as plane:
        asked = {**ASK, "Access-Control-Request-Headers": "authorization,x-stainless-os"}
        response = await plane.http.options("/v1/completions", headers=asked)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "https://chat.example.com"
        assert "authorization" in response.headers["access-control-allow-headers"]
        other = {**asked, "Origin": "https://other.example.com"}
        response = await plane.http.options("/v1/completions", headers=other)
        assert response.status_code == 400
        assert "access-control-allow-origin" not in response.headers
        for headers, status in ((ASK, 401), ({**ASK, **BEARER}, 200)):
            response = await plane.http.post("/v1/completions", json=COMPLETION, headers=headers)
            assert response.status_code == status
            assert response.headers["access-control-allow-origin"] == "https://chat.example.com"


@pytest.mark.parametrize("origins", [[], ["*"]])
async def test_every_step_of_a_stream_is_sent_on_its_own(one_by_one, origins):
    """Nothing in front of the routes may hold back what they write."""
    options = IngressOptions(cors_allow_origins=origins)
    async with open_plane(options=options) as plane:
        exchange = Exchange(plane.app, {"Origin": "https://a.example"})
        body = {**COMPLETION, "max_tokens": 20, "stream": True}
        exchange.feed(json.dumps(body).encode(), more=False)
        while len(exchange.sent) < 3:
            await asyncio.sleep(0)
        assert not exchange.task.done() and exchange.status == 200
        await asyncio.wait_for(exchange.task, 10)
        assert len(exchange.sent) == 22  # the status, each token, and the end
