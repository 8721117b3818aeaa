"""What counts against the ingress's limit, for how long, and what is refused before it counts."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from engine.request import EngineRequest
from engine.sampling_params import SamplingParams
from tests.deployments.plane import open_plane

COMPLETION = {"model": "m", "prompt": "hi there", "max_tokens": 2}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.fixture
async def plane():
    async with open_plane() as opened:
        yield opened


async def post(plane: Any, path: str, body: Any) -> tuple[int, str | None]:
    """Status, and the field that the error names."""
    response = await plane.http.post(path, content=json.dumps(body))
    return response.status_code, response.json().get("error", {}).get("param")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"cache_salt": "\ud800"}, "cache_salt"),
        ({"stop": ["\ud800"]}, "stop"),
        ({"user": "\udfff"}, "user"),
        ({"logit_bias": {"\ud800": 1}}, "logit_bias"),
        ({"model": "\ud800"}, "model"),
        ({"what\ud800": 1}, None),
        ({"priority": 10**30}, "priority"),
        ({"priority": -(2**63) - 1}, "priority"),
    ],
)
async def test_what_cannot_be_encoded_is_refused_and_takes_no_slot(plane, change, param):
    for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        assert await post(plane, path, {**body, **change}) == (400, param)
    assert plane.client.num_running == 0


async def test_paired_surrogates_are_characters(plane):
    content = json.dumps({**COMPLETION, "prompt": "smile \U0001f600", "echo": True})
    assert "\\ud83d" in content
    answer = (await plane.http.post("/v1/completions", content=content)).json()
    assert answer["choices"][0]["text"].startswith("smile \U0001f600")


async def test_raw_surrogates_are_not_json(plane):
    content = b'{"model": "m", "prompt": "\xed\xa0\x80"}'
    response = await plane.http.post("/v1/completions", content=content)
    assert response.status_code == 400


async def test_a_failed_start_leaves_nothing_running(plane):
    remote = plane.handle.generate.remote
    calls = []

    def fails_third(*args: Any) -> Any:
        if len(calls) == 2:
            raise RuntimeError("no more")
        calls.append(remote(*args))
        return calls[-1]

    plane.handle.generate = SimpleNamespace(remote=fails_third)
    requests = [EngineRequest(f"r{i}", [1, 2], SamplingParams(seed=0)) for i in range(4)]
    with pytest.raises(RuntimeError, match="no more"):
        plane.client.start(requests)
    assert plane.client.num_running == 0
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert len(calls) == 2 and all(call.task.cancelled() for call in calls)


async def test_requests_are_encoded_before_any_starts(plane):
    good, bad = (EngineRequest(i, [1], SamplingParams(seed=0)) for i in ("good", "bad"))
    bad.cache_salt = "\ud800"
    started = []
    plane.handle.generate = SimpleNamespace(remote=lambda *args: started.append(args))
    with pytest.raises(UnicodeEncodeError):
        plane.client.start([good, bad])
    assert started == [] and plane.client.num_running == 0
