"""What a client is told when the server is full, has no engine or loses one."""

from __future__ import annotations

import pytest
from ray.serve.exceptions import BackPressureError

from engine.errors import EngineDead
from tests.deployments.plane import COMPLETION, events, open_plane


async def test_full_server_answers_429_with_retry_after(plane):
    plane.model.max_concurrent_requests = 3
    plane.client.num_running = 2
    response = await plane.http.post("/v1/completions", json={**COMPLETION, "n": 2})
    plane.client.num_running = 0
    assert response.status_code == 429
    assert response.headers["retry-after"] == "3"


async def test_no_engine_answers_503(plane):
    plane.table.set_members("Engine-m", [])
    response = await plane.http.post("/v1/completions", json=COMPLETION)
    assert response.status_code == 503
    assert "retry-after" in response.headers
    ready = await plane.http.get("/ready")
    assert (ready.status_code, ready.headers["retry-after"]) == (503, "3")
    assert "No engine of 'm'" in ready.json()["error"]["message"]
    health = await plane.http.get("/health")  # of the process: to end it would help nobody
    assert (health.status_code, health.json()["status"]) == (200, "unready")
    assert health.json()["without_engine"] == ["m"]


async def test_ready_is_what_can_be_served_now(plane, monkeypatch):
    assert (await plane.http.get("/ready")).json() == {"status": "ready"}
    assert (await plane.http.get("/health")).json()["engines"][0]["serving"] is True
    monkeypatch.setattr("deployments.ingress.served.SILENT_S", -1.0)  # no report is fresh
    assert (await plane.http.get("/ready")).status_code == 503
    health = (await plane.http.get("/health")).json()
    assert (health["status"], health["engines"][0]["serving"]) == ("unready", False)
    monkeypatch.undo()
    (view,) = plane.table.view("Engine-m")
    assert plane.model.is_served_by(view)
    view.load.overdue = True  # a step hangs
    assert not plane.model.is_served_by(view)
    plane.links["e0"].broken.set()  # and again, whenever it is read anew
    await plane.until(lambda: not plane.hub.connected("Engine-m"))
    assert (await plane.http.get("/ready")).status_code == 503
    plane.model.may_scale_to_zero = True
    assert (await plane.http.get("/ready")).status_code == 200


@pytest.mark.parametrize("rests", [False, True])
async def test_metrics_tell_what_the_alert_of_no_engine_asks_for(plane, rests):
    plane.table.set_members("Engine-m", [])
    plane.model.may_scale_to_zero = rests
    page = (await plane.http.get("/metrics")).text
    told = {line.partition("{")[0]: line.split()[-1] for line in page.splitlines()}
    names = ("num_engines", "num_requests_held", "scales_to_zero")
    assert [float(told[f"trunkline_{name}"]) for name in names] == [0, 0, rests]


async def test_errors_of_the_serve_call(plane):
    plane.handle.failure = BackPressureError(num_queued_requests=1, max_queued_requests=1)
    plane.handle.set_limit(0)
    response = await plane.http.post("/v1/completions", json=COMPLETION)
    plane.handle.set_limit(1000)
    assert (response.status_code, "retry-after" in response.headers) == (503, True)
    plane.handle.failure = EngineDead("secret detail")
    response = await plane.http.post("/v1/completions", json=COMPLETION)
    assert response.status_code == 503 and "secret" not in response.text
    assert response.json()["error"]["code"] == "engine_lost" and "retry-after" in response.headers
    plane.handle.failure = KeyError("/secret/path")
    response = await plane.http.post("/v1/completions", json=COMPLETION)
    assert response.status_code == 500 and "secret" not in response.text
    plane.handle.failure = None
    assert (await plane.http.post("/v1/completions", json=COMPLETION)).status_code == 200
    assert plane.client.num_running == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_refusal_by_the_engine_is_a_400_with_its_reason(plane, stream):
    plane.model.max_model_len = 100_000  # more than the engine says
    body = {**COMPLETION, "prompt": "one " * 5000, "stream": stream}
    response = await plane.http.post("/v1/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["message"] == "The prompt is too long."
    assert plane.client.num_running == 0


async def test_engine_death_mid_stream_is_an_error_event():
    async with open_plane(step_s=0.001, die_at_token=5) as plane:
        body = {**COMPLETION, "max_tokens": 50, "stream": True}
        parts = events((await plane.http.post("/v1/completions", json=body)).text)
        assert "error" in parts[-1] and "choices" in parts[0]
        answer = await plane.http.post("/v1/completions", json={**body, "stream": False})
        assert answer.status_code == 503
