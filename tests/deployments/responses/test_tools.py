"""Calls of tools through `/v1/responses`, on the plane without Ray."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from deployments.ingress.message_style import MessageStyle
from deployments.wire import decode_submissions
from tests.deployments.plane import open_plane
from tests.deployments.responses.asking import ADD, CALLED, RESULT, TOOLS, saying, streamed, whole
from tests.deployments.test_chat_messages import BROKEN, CALL_1, CALL_2, END, LISTED, repeater


def kinds_of(events: list[Any]) -> list[str]:
    """The types of events, but for repeated deltas."""
    kinds = [event.type.removeprefix("response.") for event in events]
    return [
        kind
        for kind, last in zip(kinds, ["", *kinds], strict=False)
        if kind != last or not kind.endswith("delta")
    ]


async def test_calls_are_items(plane):
    plane.model.style = MessageStyle.of(plane.model.tokenizer, "hermes", "qwen3")
    body = saying(f"<think>hm</think>I look.\n{CALL_1}\n{CALL_2}", tools=TOOLS)
    response = await whole(plane, body)
    assert [item.type for item in response.output] == [
        *("reasoning", "message", "function_call", "function_call"),
    ]
    assert (response.output_text, response.status) == ("I look.\n", "completed")
    calls = response.output[2:]
    expected = [("get_weather", {"city": "Zürich 🌧"}), ("add", {"a": 1, "b": [2]})]
    assert [(call.name, json.loads(call.arguments)) for call in calls] == expected
    assert len({call.call_id for call in calls} | {call.id for call in calls}) == 4
    assert [tool.name for tool in response.tools] == ["get_weather", "add"]
    assert [tool.strict for tool in response.tools] == [None, True]
    assert (response.tool_choice, response.parallel_tool_calls) == ("auto", True)

    events = await streamed(plane, body)
    call = ("output_item.added", *(f"function_call_arguments.{what}" for what in ("delta", "done")))
    assert kinds_of(events[2:]) == [
        *("output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done"),
        *("content_part.done", "output_item.done", "output_item.added", "content_part.added"),
        *("output_text.delta", "output_text.done", "content_part.done", "output_item.done"),
        *(*call, "output_item.done", *call, "output_item.done", "completed"),
    ]
    told = events[-1].response.output
    assert [(item.name, json.loads(item.arguments)) for item in told[2:]] == expected
    for index, item in enumerate(told[2:], 2):
        mine = [event for event in events if getattr(event, "output_index", None) == index]
        added, *deltas, done, ended = mine
        assert (added.item.arguments, added.item.status) == ("", "in_progress")
        assert "".join(e.delta for e in deltas) == done.arguments == item.arguments
        assert deltas and {e.item_id for e in (*deltas, done)} == {item.id}
        assert ended.item == item and item.status == "completed"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "add"}])
async def test_calls_that_must_be(plane, monkeypatch, choice):
    seen = []
    submit = plane.actors["e0"].submit
    monkeypatch.setattr(plane.actors["e0"], "submit", lambda d: (seen.append(d), submit(d))[1])
    body = saying(LISTED, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
    response = await whole(plane, body)
    (call,) = response.output
    assert (call.name, call.arguments, response.parallel_tool_calls) == ("add", '{"a":1}', False)
    (told,) = (await streamed(plane, body))[-1].response.output
    assert (told.name, told.arguments) == (call.name, call.arguments)
    (submission,) = decode_submissions(seen[0])
    items = json.loads(submission.request.params.structured_outputs.json)["items"]["anyOf"]
    names = [item["properties"]["name"]["const"] for item in items]
    assert names == (["get_weather", "add"] if choice == "required" else ["add"])


class Add(BaseModel):
    a: int
    b: list[int] = []


async def test_openais_client_goes_round_the_loop_of_tools(plane):
    plane.model.style = MessageStyle.of(plane.model.tokenizer, "hermes", "qwen3")
    client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="-", http_client=plane.http)
    tools: list[Any] = [openai.pydantic_function_tool(Add, name="add")]
    asked = saying(f"<think>hm</think>So:\n{CALL_2}\n{CALL_2}")
    options: dict[str, Any] = {"model": "m", "extra_body": {"stop": END}, "tools": tools}
    async with client.responses.stream(input=asked["input"], **options) as stream:
        events = [event async for event in stream]
        final = await stream.get_final_response()
    thought, message, *calls = final.output
    assert (thought.type, message.type) == ("reasoning", "message")
    assert [call.parsed_arguments for call in calls] == [Add(a=1, b=[2])] * 2
    snapshots = [e.snapshot for e in events if e.type == "response.function_call_arguments.delta"]
    assert snapshots[-1] == calls[1].arguments
    results = [
        {"type": "function_call_output", "call_id": call.call_id, "output": "3"} for call in calls
    ]
    turns = [{"role": "user", "content": "?"}, *final.output, *results, saying("It is 3.")["input"]]
    turns[-1] = {"role": "user", "content": turns[-1]}
    answer = await client.responses.parse(input=turns, **options)
    assert answer.output_text == "It is 3."


async def test_what_is_no_valid_call(plane):
    plane.model.style = MessageStyle.of(plane.model.tokenizer, "hermes", None)
    body = saying(f"So:\n{BROKEN}", tools=TOOLS)
    response = await whole(plane, body)
    assert [item.type for item in response.output] == ["message"]
    assert response.output_text == f"So:\n{BROKEN}"
    items = (await streamed(plane, body))[-1].response.output
    assert [(item.type, item.status) for item in items] == [
        *(("message", "completed"), ("function_call", "incomplete"), ("message", "completed")),
    ]  # what has been told cannot be taken back
    cut = saying(CALL_2, tools=TOOLS, max_output_tokens=18)
    assert (await whole(plane, cut)).output[0].type == "message"
    last = (await streamed(plane, cut))[-1]
    assert (last.type, last.response.output[0].status) == ("response.incomplete", "incomplete")
    for less in ({"tool_choice": "none"}, {"tools": []}):
        assert (await whole(plane, saying(CALL_2, tools=TOOLS) | less)).output_text == CALL_2


async def test_calls_and_their_outputs_go_to_the_template():
    template = "{{ tools | tojson }}|{{ messages | tojson }}" + END
    items = [
        {"role": "user", "content": "1 + 1?"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "h"}]},
        {"role": "assistant", "content": "I add."},
        {**CALLED, "id": "fc_1", "status": "completed"},
        {**CALLED, "call_id": "c2", "arguments": "{"},
        RESULT,
        {**RESULT, "call_id": "c2", "output": [{"type": "input_text", "text": "3"}]},
        {**CALLED, "call_id": "c3"},
        {**RESULT, "call_id": "c3", "output": "4", "status": None},
    ]
    async with open_plane(tokenizer=repeater(template)) as plane:
        plane.model.max_model_len = 2000
        body = {"model": "m", "input": items, "tools": [ADD], "tool_choice": "auto", "stop": END}
        said = (await whole(plane, body)).output_text
    tools, _, messages = said.partition("|")
    function = {"name": "add", "description": "a + b", "strict": True}
    assert json.loads(tools) == [{"type": "function", "function": function}]
    user, first, *results = json.loads(messages)
    assert user == {"role": "user", "content": "1 + 1?"}
    assert (first["content"], first["reasoning_content"]) == ("I add.", "h")
    assert [(c["id"], c["function"]["arguments"]) for c in first["tool_calls"]] == [
        *(("c1", {"a": 1}), ("c2", "{")),
    ]
    assert [m["role"] for m in results] == ["tool", "tool", "assistant", "tool"]
    assert [(m["tool_call_id"], m["content"]) for m in results if m["role"] == "tool"] == [
        *(("c1", "2"), ("c2", "3"), ("c3", "4")),
    ]
