"""Questions to `/v1/responses` and what comes back, checked with OpenAI's own types."""

from __future__ import annotations

import json
from typing import Any

from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from tests.deployments.plane import Plane
from tests.deployments.test_chat_messages import END

PATH = "/v1/responses"
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FORMAT = {"type": "json_schema", "name": "thing", "schema": SCHEMA, "strict": True}
ITEMS: list[dict[str, Any]] = [
    {"role": "developer", "content": "Be brief."},
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "one"}]},
    {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "why"}]},
    {
        "type": "message",
        "id": "msg_1",
        "status": "completed",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "two", "annotations": []}],
    },
    {"role": "user", "content": "three"},
]
WEATHER: dict[str, Any] = {"type": "function", "name": "get_weather", "parameters": {}}
ADD: dict[str, Any] = {"type": "function", "name": "add", "description": "a + b", "strict": True}
TOOLS = [WEATHER, ADD]
CALLED = {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "2"}


def saying(answer: str, **more: Any) -> dict[str, Any]:
    return {"model": "m", "input": answer + END, "stop": END, **more}


def extras(value: Any, where: str = "") -> set[str]:
    """Fields that OpenAI's types do not know."""
    found: set[str] = set()
    if isinstance(value, BaseModel):
        found |= {f"{where}.{name}" for name in value.model_extra or ()}
        for name in type(value).model_fields:
            found |= extras(getattr(value, name), f"{where}.{name}")
    if isinstance(value, list):
        for item in value:
            found |= extras(item, where)
    return found


def check_response(value: dict[str, Any]) -> Response:
    response = Response.model_validate(value, strict=True)
    assert extras(response) <= {".store"}
    return response


async def whole(plane: Plane, body: dict[str, Any]) -> Response:
    answer = await plane.http.post(PATH, json=body)
    assert answer.status_code == 200, answer.text
    return check_response(answer.json())


async def streamed(plane: Plane, body: dict[str, Any]) -> list[Any]:
    answer = await plane.http.post(PATH, json={**body, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in answer.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        value = json.loads(data.removeprefix("data: "))
        assert name == f"event: {value['type']}"
        assert value["sequence_number"] == len(events)
        event = EVENT.validate_python(value)
        assert extras(event) <= {".response.store"}
        events.append(event)
    return events


async def refused(plane: Plane, **body: Any) -> dict[str, Any]:
    answer = await plane.http.post(PATH, json={"model": "m", "input": "hi", **body})
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]
