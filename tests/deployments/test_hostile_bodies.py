"""Bodies that nobody should send: each is answered, and so is the next request."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deployments.ingress.app import ROUTES
from deployments.ingress.openapi import openapi_document
from tests.deployments.plane import open_plane

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
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 2,
}
"""Valid for every endpoint."""
FIELDS = sorted(
    {
        name
        for schema in openapi_document()["components"]["schemas"].values()
        for name in schema["properties"]
    }
    | {"tools", "response_format", "suffix", "best_of", "functions", "guided_json", "unknown"}
)
INSIDE = re.compile(
    r"Traceback|site-packages|\.py\b|/work|/home|/tmp|/usr|0x[0-9a-f]{6}|"
    r"pydantic|jinja|starlette|msgspec|tokenizers|deployments\.|engine\.|ray\."
)
"""What would tell of the machine or the program."""

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 1, 2**31, 2**63, -(2**63) - 1, 10**400, 49151, 49152]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        ["", "m", "\x00", "\ud800", "<|im_start|>", "e\u0301", "{{ 7 * 7 }}", "A" * 5000]
    ),
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
        self._context = open_plane()
        self.plane = self._run(self._context.__aenter__())

    def close(self) -> None:
        self._run(self._context.__aexit__(None, None, None))

    def post(self, path: str, content: bytes) -> httpx.Response:
        """Send a body, and find the answer proper and nothing left behind."""
        headers = {"Content-Type": "application/json"}
        response = self._run(self.plane.http.post(path, content=content, headers=headers))
        check_answer(response, content.decode("utf-8", "replace"))
        plane = self.plane
        assert plane.client.num_running == plane.model.num_preparing == 0
        self._run(plane.until(lambda: all(e.num_booked == 0 for e in plane.view())))
        good = self._run(plane.http.post("/generate", json=GOOD))
        assert good.json()["text"] == "one two"
        return response


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
        *events, last = [line for line in response.text.splitlines() if line]
        assert last == "data: [DONE]"
        assert all("error" not in json.loads(event.removeprefix("data: ")) for event in events)
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
    assert target.post(path, content).status_code == 400


@QUIET
@given(path=st.sampled_from(PATHS), value=values)
def test_any_json(target, path, value):
    target.post(path, json.dumps(value).encode())


@settings(QUIET, max_examples=400)
@given(path=st.sampled_from(PATHS), field=st.sampled_from(FIELDS), value=values)
def test_a_valid_body_with_one_field_changed(target, path, field, value):
    target.post(path, json.dumps({**GOOD, field: value}).encode())


@QUIET
@given(
    path=st.sampled_from(PATHS),
    fields=st.dictionaries(st.sampled_from(FIELDS), values, max_size=4),
    missing=st.sets(st.sampled_from(sorted(GOOD)), max_size=2),
)
def test_a_valid_body_with_several_fields_changed(target, path, fields, missing):
    body = {name: value for name, value in GOOD.items() if name not in missing}
    target.post(path, json.dumps({**body, **fields}).encode())


@QUIET
@given(path=st.sampled_from(PATHS), data=st.data())
def test_a_valid_body_with_bytes_changed(target, path, data):
    content = bytearray(json.dumps(GOOD).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        cut = data.draw(st.integers(0, 5))
        content[at : at + cut] = data.draw(st.binary(max_size=5))
    target.post(path, bytes(content))
