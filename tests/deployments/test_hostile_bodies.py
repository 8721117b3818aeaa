"""Bodies that nobody should send: each is answered, and so is the next request."""

from __future__ import annotations

import asyncio
import copy
import json
import re
from collections.abc import Iterator
from functools import reduce
from operator import getitem
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deployments.ingress.app import ROUTES
from deployments.ingress.message_style import MessageStyle
from deployments.ingress.openapi import openapi_document
from tests.deployments.plane import MAX_MODEL_LEN, open_plane

QUIET = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    database=None,
    derandomize=True,
)
PATHS = [path for method, path, _ in ROUTES if method == "POST"]
GOOD: dict[str, Any] = {
    "model": "m",
    "prompt": "one two",
    "prompts": ["one two", "three"],
    "input": "one two",
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 2,
}
"""Valid for every endpoint."""
CALL = {"name": "f", "arguments": '{"a": 1}'}
WITH_TOOLS: dict[str, Any] = {
    "model": "m",
    "messages": [
        {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": CALL}]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "hi"}]},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "tool_choice": "auto",
    "max_tokens": 2,
}
FIELDS = sorted(
    {
        name
        for schema in openapi_document(("m",))["components"]["schemas"].values()
        for name in schema["properties"]
    }
    | {"tools", "response_format", "functions", "unknown"}
)
LIMIT_S = 30
"""A request that takes longer hangs; the slowest takes a tenth of a second."""
INSIDE = re.compile(
    r"Traceback|site-packages|\.py\b|/work|/home|/tmp|/usr|0x[0-9a-f]{6}|"
    r"pydantic|jinja|starlette|msgspec|tokenizers|deployments\.|engine\.|ray\."
)
"""What would tell of the machine or the program."""

NASTY: list[Any] = [
    *(None, True, -1, 0, 2**31, 2**63, 10**400, 0.5, float("nan"), float("inf"), 1e400),
    *("", "m", "\x00", "\ud800", "<|im_start|>", "{{ 7 * 7 }}", "A" * 5000),
    *([], {}, [None], [""], [[]], [["a"]], {"\ud800": 1}, {"1": None}, {"9" * 5000: 1}),
    *([{"role": "user"}], [{"role": "\ud800", "content": [{"type": "text", "text": 1}]}]),
]
scalars = st.one_of(
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(NASTY),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.text(max_size=10) | st.sampled_from(FIELDS), inner, max_size=4),
        st.dictionaries(st.sampled_from(["role", "content", "type", "text"]), inner, max_size=4),
    ),
    max_leaves=12,
)


class Target:
    """The application, in an event loop that runs while a request does."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self._run = runner.run
        self._context = open_plane(max_model_len=MAX_MODEL_LEN)
        self.plane = self._run(self._context.__aenter__())
        model = self.plane.model
        model.style = MessageStyle.of(model.tokenizer, "hermes", "qwen3")

    def close(self) -> None:
        self._run(self._context.__aexit__(None, None, None))

    def post(self, path: str, content: bytes) -> None:
        """Send a body, whose answer must be proper."""
        headers = {"Content-Type": "application/json"}
        response = self.request(method="POST", url=path, content=content, headers=headers)
        check_answer(response, content.decode("utf-8", "replace"))

    def request(self, **arguments: Any) -> httpx.Response:
        """Send a request, which must leave nothing behind."""
        plane = self.plane
        # Heartbeats that were due between requests are read first, or `/ping` would miss them.
        self._run(plane.until(lambda: all((e.age_s or 0) < 1.1 for e in plane.view())))
        response = self._run(asyncio.wait_for(plane.http.request(**arguments), LIMIT_S))
        assert plane.client.num_running == plane.model.num_preparing == 0
        return response

    def still_serves(self) -> None:
        """The next request is answered, and no other is there."""
        good = self.request(method="POST", url="/generate", json=GOOD)
        assert good.json()["text"] == "one two"
        self._run(self.plane.until(lambda: all(e.num_booked == 0 for e in self.plane.view())))


def check_answer(response: httpx.Response, sent: str) -> None:
    assert response.status_code < 500, response.text
    kind = response.headers["content-type"].partition(";")[0]
    if response.status_code != 200:
        assert kind == "application/json"
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"] and error["type"]
        assert not [word for word in INSIDE.findall(error["message"]) if word not in sent]
        assert len(error["message"]) < 1000
    elif kind == "text/event-stream":
        *events, last = [line for line in response.text.split("\n") if line[:6] == "data: "]
        if response.request.url.path == "/v1/responses":
            events.append(last)  # these say by their type which is the last
        else:
            assert last == "data: [DONE]"
        assert all("error" not in json.loads(event.removeprefix("data: ")) for event in events)
    elif kind == "text/plain":
        assert response.request.url.path == "/metrics"
    else:
        assert kind == "application/json" and isinstance(response.json(), dict)


@pytest.fixture(scope="module")
def target():
    with asyncio.Runner() as runner:
        opened = Target(runner)
        yield opened
        opened.close()


@QUIET
@given(path=st.sampled_from(PATHS), content=st.binary(max_size=300))
def test_any_bytes(target, path, content):
    target.post(path, content)
    target.still_serves()


@QUIET
@given(path=st.sampled_from(PATHS), value=values)
def test_any_json(target, path, value):
    target.post(path, json.dumps(value).encode())
    target.still_serves()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/batch_generate"])
def test_every_field_with_every_nasty_value(target, path):
    for field in FIELDS:
        for value in NASTY:
            target.post(path, json.dumps({**GOOD, field: value}).encode())
        target.still_serves()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where there is something inside of a body."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


@pytest.mark.parametrize("stream", [False, True])
def test_every_place_in_a_chat_with_tools(target, stream):
    good = target.request(method="POST", url="/v1/chat/completions", json=WITH_TOOLS)
    assert good.status_code == 200
    for path in places(WITH_TOOLS):
        for value in NASTY:
            body = copy.deepcopy({**WITH_TOOLS, "stream": stream})
            inside = reduce(getitem, path[:-1], body)
            inside[path[-1]] = value
            target.post("/v1/chat/completions", json.dumps(body).encode())
        target.still_serves()


@QUIET
@given(
    path=st.sampled_from(PATHS),
    fields=st.dictionaries(st.sampled_from(FIELDS), values, max_size=4),
    missing=st.sets(st.sampled_from(sorted(GOOD)), max_size=2),
)
def test_a_valid_body_with_fields_changed(target, path, fields, missing):
    body = {name: value for name, value in GOOD.items() if name not in missing}
    target.post(path, json.dumps({**body, **fields}).encode())
    target.still_serves()


@QUIET
@given(path=st.sampled_from(PATHS), data=st.data())
def test_a_valid_body_with_bytes_changed(target, path, data):
    content = bytearray(json.dumps(GOOD).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        cut = data.draw(st.integers(0, 5))
        content[at : at + cut] = data.draw(st.binary(max_size=5))
    target.post(path, bytes(content))
    target.still_serves()
