"""What counts against the ingress's limit, for how long, and what is refused before it counts."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.ingress.served import LONG_TEXT
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams
from tests.deployments.plane import open_plane

COMPLETION = {"model": "m", "prompt": "hi there", "max_tokens": 2}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


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
    assert len(calls) == 2
    await plane.until(lambda: all(call.task.done() for call in calls))
    await plane.idle()
    assert not any(actor._owners for actor in plane.actors.values())


async def test_requests_are_encoded_before_any_starts(plane):
    good, bad = (EngineRequest(i, [1], SamplingParams(seed=0)) for i in ("good", "bad"))
    bad.cache_salt = "\ud800"
    started = []
    plane.handle.generate = SimpleNamespace(remote=lambda *args: started.append(args))
    with pytest.raises(UnicodeEncodeError):
        plane.client.start([good, bad])
    assert started == [] and plane.client.num_running == 0


WORDS = "one two three four five six "
LONG = WORDS * (LONG_TEXT // len(WORDS) + 1)
"""Long enough to be tokenized in a thread, and then too long for the model."""


def chat_of(text: str) -> dict[str, Any]:
    return {**CHAT, "messages": [{"role": "user", "content": text}]}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {**COMPLETION, "prompt": LONG}),
        ("/v1/chat/completions", chat_of(LONG)),
        ("/generate", {"prompt": LONG, "max_tokens": 2}),
    ],
)
async def test_limit_holds_while_requests_are_prepared_in_threads(path, body):
    async with open_plane(step_s=0.002) as plane:
        plane.model.max_model_len = 4096
        plane.model.max_concurrent_requests = 8
        answers = await asyncio.gather(*(post(plane, path, body) for _ in range(20)))
        assert sorted(status for status, _ in answers) == [200] * 8 + [429] * 12
        assert plane.model.num_preparing == plane.client.num_running == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_places_are_given_back_however_a_request_ends(plane, monkeypatch, stream):
    plane.model.max_concurrent_requests = 2
    for body in ({**COMPLETION, "prompt": LONG}, {**COMPLETION, "stop_token_ids": [10**6]}):
        status, _ = await post(plane, "/v1/completions", {**body, "stream": stream})
        assert status == 400
    with monkeypatch.context() as patch:
        go_on = threading.Event()
        patch.setattr(plane.model.tokenizer, "encode", lambda text: [5] * go_on.wait(10))
        body = {**COMPLETION, "prompt": LONG, "stream": stream}
        gone = asyncio.ensure_future(post(plane, "/v1/completions", body))
        await plane.until(lambda: plane.model.num_preparing == 1)
        gone.cancel()
        await asyncio.wait([gone])
        go_on.set()
    response = await plane.http.post("/v1/completions", json={**COMPLETION, "stream": stream})
    assert response.status_code == 200
    assert plane.model.num_preparing == plane.client.num_running == 0


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {**COMPLETION, "n": 4}, "n"),
        ("/v1/completions", {**COMPLETION, "prompt": ["a", "b", "c", "d"]}, "prompt"),
        ("/v1/chat/completions", {**CHAT, "n": 4}, "n"),
        ("/batch_generate", {"prompts": ["a", "b", "c", "d"]}, "prompts"),
    ],
)
async def test_more_than_the_server_ever_takes_is_no_429(plane, path, body, param):
    plane.model.max_concurrent_requests = 3
    assert await post(plane, path, body) == (400, param)


async def test_a_chat_is_not_rendered_when_the_server_is_full(plane, monkeypatch):
    rendered: list[Any] = []
    tokenizer = plane.model.tokenizer
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **k: rendered.append(a))
    plane.client.num_running = plane.model.max_concurrent_requests
    assert (await post(plane, "/v1/chat/completions", CHAT))[0] == 429
    assert rendered == []


async def test_hopelessly_long_texts_are_not_tokenized(plane, monkeypatch):
    encoded: list[str] = []
    monkeypatch.setattr(plane.model.tokenizer, "encode", lambda text, **_: encoded.append(text))
    text = "x" * (40 * plane.model.max_model_len + 1)
    for path, body, param in (
        ("/v1/completions", {**COMPLETION, "prompt": ["a", text]}, "prompt"),
        ("/v1/chat/completions", chat_of(text), "messages"),
        ("/batch_generate", {"prompts": [text]}, "prompts"),
    ):
        assert await post(plane, path, body) == (400, param)
    assert encoded == []


@pytest.mark.parametrize("num_sent", [0, 1, 2])
async def test_a_stream_that_cannot_be_sent_ends_at_once(plane, num_sent):
    """The client is gone when headers, or the n-th event, are sent; nobody collects garbage."""
    app = plane.http._transport.app
    body = json.dumps({**COMPLETION, "max_tokens": 100, "stream": True}).encode()
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "headers": [],
        "query_string": b"",
    }
    incoming = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[Any] = []

    async def receive() -> Any:
        return incoming.pop() if incoming else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if len(sent) == num_sent:
            raise ConnectionError("gone")
        sent.append(message)

    gc.disable()
    try:
        with pytest.raises(ConnectionError) as caught:  # kept, and with it what the frames refer to
            await app(scope, receive, send)
        assert plane.client.num_running == 0, caught
    finally:
        gc.enable()
