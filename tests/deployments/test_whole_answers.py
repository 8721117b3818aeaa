"""Whole answers: large ones are made in a thread, in parts, and small ones at once."""

from __future__ import annotations

import json
import threading
from typing import Any

import msgspec
import pytest
from starlette.responses import Response

from deployments.aside import run_aside
from deployments.ingress import served, whole_answers
from deployments.ingress.whole_answers import json_in_parts
from tests.deployments.plane import Plane, open_plane
from tests.deployments.test_text_offsets import ScoringCore

CHAT = [{"role": "user", "content": "hi"}]
REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": CHAT, "logprobs": True},
    "/v1/completions": {"prompt": "hi", "logprobs": 0},
    "/v1/responses": {"input": "hi", "include": ["message.output_text.logprobs"]},
    "/tokenize": {"prompt": "one two three four five six", "return_token_strs": True},
}
LIMITS = {"/v1/responses": "max_output_tokens", "/tokenize": "n"}


class Seen:
    """In which threads answers were made, and what else of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.threads: list[str] = []
        self.made_aside: list[type] = []
        render = Response.render

        def note_thread(response: Response, content: Any) -> bytes | memoryview:
            self.threads.append(threading.current_thread().name.partition("_")[0])
            return render(response, content)

        async def note_made(work: Any) -> Any:
            made = await run_aside(work)
            self.made_aside.append(type(made))
            return made

        monkeypatch.setattr(Response, "render", note_thread)
        monkeypatch.setattr(served, "run_aside", note_made)


@pytest.fixture
async def scoring(monkeypatch):
    monkeypatch.setattr("tests.deployments.plane.FakeCore", ScoringCore)
    async with open_plane() as opened:
        yield opened


async def ask(plane: Plane, path: str, num_tokens: int) -> dict[str, Any]:
    fields = {LIMITS.get(path, "max_tokens"): num_tokens} if path != "/tokenize" else {}
    body = {"model": "m", **REQUESTS[path], **fields}
    response = await plane.http.post(path, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    return response.json()


@pytest.mark.parametrize("path", REQUESTS)
async def test_large_answers_are_made_aside_and_small_ones_at_once(scoring, monkeypatch, path):
    plain = await ask(scoring, path, 30)
    seen = Seen(monkeypatch)
    assert (await ask(scoring, path, 30)).keys() == plain.keys()
    assert (seen.threads, seen.made_aside) == (["MainThread"], [])
    monkeypatch.setattr(served, "LONG_TEXT", 5)
    large = await ask(scoring, path, 30)
    assert seen.threads[1:] == ["aside"]
    assert seen.made_aside[-1] is Response and dict not in seen.made_aside  # one way, not two
    assert json.dumps(large).count("token") == json.dumps(plain).count("token")


async def test_what_an_answer_has_come_to_decides(scoring, monkeypatch):
    """Not what it might have come to: most requests do not say how little they want."""
    monkeypatch.setattr(served, "LONG_TEXT", 40)
    seen = Seen(monkeypatch)
    body = {"model": "m", **REQUESTS["/v1/completions"], "prompt": "hi you", "stop": "hi"}
    response = await scoring.http.post("/v1/completions", json=body)
    assert response.json()["usage"]["completion_tokens"] == 1
    assert (seen.threads, seen.made_aside) == (["MainThread"], [])


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"a": []},
        {"a": {}, "choices": [], "logprobs": None},
        {"choices": [{}, {"logprobs": {"content": [{"x": 1}] * 200, "y": None}, "text": "é\n"}]},
        {"tokens": list(range(1000)), "strs": [str(i) for i in range(129)]},
    ],
)
def test_parts_make_up_what_is_encoded_at_once(value):
    assert json_in_parts(value, ("choices", "logprobs")) == msgspec.json.encode(value)
    lazy = {name: iter(v) if isinstance(v, list) else v for name, v in value.items()}
    assert json_in_parts(lazy, ("choices", "logprobs")) == msgspec.json.encode(value)


def test_no_part_is_large():
    """The encoder keeps the interpreter to itself, and so the event loop from running."""
    entry = {"token": "word", "top_logprobs": [{"token": "word", "logprob": -1.0}] * 20}
    value = {"choices": [{"logprobs": {"content": [entry] * 5000}}] * 3, "ids": [7] * 100_000}
    parts = list(whole_answers._object(value, ("choices", "logprobs")))
    assert sum(map(len, parts)) > 10_000_000 and max(map(len, parts)) < 100_000
