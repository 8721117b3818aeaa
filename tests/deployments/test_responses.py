"""`/v1/responses` on the plane without Ray; OpenAI's own types say whether an answer is one.

As in the tests of chats, the model repeats the last message up to a mark.
"""

from __future__ import annotations

import copy
import json
from functools import reduce
from operator import getitem
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from deployments.ingress.message_style import MessageStyle
from deployments.wire import decode_submissions
from engine.errors import EngineDead
from tests.deployments.plane import MAX_MODEL_LEN, Plane, open_plane
from tests.deployments.test_chat_messages import BROKEN, CALL_1, CALL_2, END, LISTED, repeater
from tests.deployments.test_hostile_bodies import NASTY, Target, places, target  # noqa: F401
from tests.deployments.test_logprobs import LogprobCore

PATH = "/v1/responses"
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
UNKEPT = {"type": "string", "pattern": "a", "minLength": 3}
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


@pytest.fixture
async def plane():
    async with open_plane(tokenizer=repeater()) as opened:
        yield opened


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


async def test_a_text_is_answered(plane):
    body = saying("one two three", instructions="Be brief.", metadata={"k": "v"}, user="u")
    response = await whole(plane, body | {"temperature": 0.0, "top_p": 0.5, "store": True})
    assert response.output_text == "one two three"
    assert response.status == "completed" and response.completed_at >= response.created_at
    assert response.id.startswith("resp_")
    assert (response.instructions, response.metadata, response.user) == (
        *("Be brief.", {"k": "v"}, "u"),
    )
    assert (response.temperature, response.top_p) == (0.0, 0.5)
    assert response.model_extra == {"store": False}
    usage = response.usage
    assert usage.output_tokens >= 3
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.output_tokens_details.reasoning_tokens == 0


async def test_events_come_in_openais_order(plane):
    events = await streamed(plane, saying("one two three"))
    kinds = [event.type.removeprefix("response.") for event in events]
    num_deltas = kinds.count("output_text.delta")
    assert num_deltas >= 2
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * num_deltas,
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    done = events[-1].response
    assert "".join(e.delta for e in events if hasattr(e, "delta")) == done.output_text
    assert done.output_text == "one two three"
    assert events[0].response.status == "in_progress" and events[0].response.output == []
    assert events[0].response.id == done.id
    assert events[2].item.status == "in_progress" and events[2].item.content == []
    assert events[-2].item == done.output[0]
    again = await whole(plane, saying("one two three"))
    assert (again.output_text, again.usage.output_tokens) == (
        *("one two three", done.usage.output_tokens),
    )


async def test_an_answer_that_is_cut_off_is_incomplete(plane):
    body = saying("one two three four", max_output_tokens=2)
    response = await whole(plane, body)
    assert (response.status, response.output[0].status) == ("incomplete", "incomplete")
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage.output_tokens == 2 and response.completed_at is None
    last = (await streamed(plane, body))[-1]
    assert last.type == "response.incomplete"
    assert last.response.incomplete_details.reason == "max_output_tokens"


async def test_thinking_is_an_item_of_its_own(plane):
    plane.model.style = MessageStyle.of(plane.model.tokenizer, None, "qwen3")
    body = saying("<think>one two</think>three")
    response = await whole(plane, body)
    thought, message = response.output
    assert thought.content[0].text == "one two" and message.content[0].text == "three"
    details = response.usage.output_tokens_details
    assert 2 <= details.reasoning_tokens < response.usage.output_tokens
    events = await streamed(plane, body)
    added = [e for e in events if e.type == "response.output_item.added"]
    assert [(e.item.type, e.output_index) for e in added] == [("reasoning", 0), ("message", 1)]
    deltas = [e.delta for e in events if e.type == "response.reasoning_text.delta"]
    assert "".join(deltas) == "one two"
    assert events[-1].response.output_text == "three"
    response = await whole(plane, {**body, "max_output_tokens": 4})
    assert [item.type for item in response.output] == ["reasoning"]  # it never got to a message
    assert response.output[0].status == "incomplete"


async def test_an_answer_that_is_held_to_a_form_has_no_thinking(plane):
    plane.model.style = MessageStyle.of(plane.model.tokenizer, None, "deepseek_r1")
    body = saying('{"a": 1}', text={"format": FORMAT})
    assert (await whole(plane, body)).output_text == '{"a": 1}'
    del body["text"]
    assert [item.type for item in (await whole(plane, body)).output] == ["reasoning"]


async def test_an_empty_answer_is_an_empty_message(plane):
    response = await whole(plane, saying(""))
    assert [item.type for item in response.output] == ["message"]
    assert response.output_text == ""


async def test_items_become_the_messages_of_a_chat():
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %};{% endfor %}" + END
    )
    async with open_plane(tokenizer=repeater(template)) as plane:
        body = {"model": "m", "input": ITEMS, "instructions": "Rhyme.", "stop": END}
        response = await whole(plane, body)
        expected = "system:Rhyme.;system:Be brief.;user:one;assistant:two(why);user:three;"
        assert response.output_text == expected
        own = [item.model_dump() for item in response.output]
        again = await whole(plane, {**body, "input": [*ITEMS, *own, ITEMS[-1]]})
        assert again.output_text == f"{expected}assistant:{expected};user:three;"


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


async def test_log_probabilities_of_the_text(monkeypatch):
    monkeypatch.setattr("tests.deployments.plane.FakeCore", LogprobCore)
    async with open_plane(tokenizer=repeater()) as plane:
        body = saying("smile 🚀 café", include=["message.output_text.logprobs"], top_logprobs=2)
        response = await whole(plane, body)
        events = await streamed(plane, body)
        assert await refused(plane, top_logprobs=2)
        plane.model.style = MessageStyle.of(plane.model.tokenizer, "hermes", None)
        error = await refused(plane, tools=TOOLS, include=["message.output_text.logprobs"])
        assert error["param"] == "include"
        plane.model.logprobs.limit = 1
        error = await refused(plane, include=["message.output_text.logprobs"])
        assert error["param"] == "top_logprobs"
    entries = response.output[0].content[0].logprobs
    assert len(entries) == response.usage.output_tokens and response.top_logprobs == 2
    read = b"".join(bytes(entry.bytes) for entry in entries).decode()
    assert read.startswith("smile 🚀 café") and {len(e.top_logprobs) for e in entries} == {2}
    assert events[-1].response.output[0].content[0].logprobs == entries
    told = [t for e in events if e.type == "response.output_text.delta" for t in e.logprobs]
    assert [t.token for t in told] == [e.token for e in entries]


@pytest.mark.parametrize("effort", ["none", "high"])
async def test_effort_goes_to_the_template(effort):
    template = "{{ reasoning_effort }}-{{ enable_thinking }}" + END
    async with open_plane(tokenizer=repeater(template)) as plane:
        body = {"model": "m", "input": "x", "stop": END, "reasoning": {"effort": effort}}
        response = await whole(plane, body)
    assert response.output_text == f"{effort}-{effort != 'none'}"
    assert response.reasoning.effort == effort


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("previous_response_id", "resp_1"),
        ("conversation", "conv_1"),
        ("conversation", {"id": "conv_1"}),
        ("background", True),
        ("prompt", {"id": "pmpt_1"}),
        ("tools", [{"type": "web_search"}]),
        ("tools", [WEATHER, {"type": "function", "function": {"name": "f"}}]),
        ("tools", [{"type": "function"}]),
        ("tools", [{"type": "function", "name": "f", "parameters": []}]),
        ("tools", [{"type": "function", "name": "f", "strict": "yes"}]),
        ("tools", [7]),
        ("tool_choice", "required"),
        ("tool_choice", "always"),
        ("tool_choice", {"type": "function", "name": "f"}),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("tool_choice", {"type": "allowed_tools", "mode": "auto", "tools": [WEATHER]}),
        ("parallel_tool_calls", "no"),
        ("truncation", "auto"),
        ("top_logprobs", 2),
        ("reasoning", {"effort": "huge"}),
        ("reasoning", {"summary": "auto"}),
        ("n", 2),
        ("max_tokens", 5),
        ("max_output_tokens", 0),
        ("max_output_tokens", "5"),
        ("temperature", -1),
        ("metadata", {"k": 1}),
        ("metadata", {"k": "v" * 513}),
        ("metadata", {str(i): "v" for i in range(17)}),
        ("text", {"verbosity": "low"}),
        ("text", {"format": {"type": "xml"}}),
        ("text", {"format": {"type": "json_schema", "schema": {}}}),
        ("text", {"format": {**FORMAT, "schema": UNKEPT}}),
        ("guided_regex", "a"),
        ("input", []),
        ("input", ["hi"]),
        ("input", [{"role": "tool", "content": "hi"}]),
        ("input", [{"role": "user"}]),
        ("input", [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]),
        ("input", [{"type": "item_reference", "id": "msg_1"}]),
        ("input", [RESULT]),
        ("input", [CALLED, {**RESULT, "call_id": "c2"}]),
        ("input", [CALLED, {**RESULT, "call_id": []}]),
        ("input", [CALLED, {**RESULT, "output": None}]),
        ("input", [CALLED, {**RESULT, "output": [{"type": "input_image", "image_url": "x"}]}]),
        ("input", [{**CALLED, "call_id": None}]),
        ("input", [{**CALLED, "arguments": {}}]),
        ("input", [{"type": "web_search_call", "id": "1"}]),
        ("input", "one " * 2 * MAX_MODEL_LEN),
    ],
)
async def test_what_cannot_be_done_is_refused(plane, field, value):
    more = {"text": {"format": {"type": "json_object"}}} if field == "guided_regex" else {}
    error = await refused(plane, **{field: value}, **more)
    assert error["param"] == field and error["type"] == "invalid_request_error"


async def test_what_asks_for_nothing_is_accepted(plane):
    more = {"background": False, "tools": [], "tool_choice": "auto", "truncation": "disabled"}
    more |= {"reasoning": None, "include": ["reasoning.encrypted_content"], "conversation": None}
    more |= {"stream_options": {"include_obfuscation": False}, "text": {"verbosity": "medium"}}
    assert (await whole(plane, saying("one", **more))).output_text == "one"


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"json_object": True}),
        (FORMAT, {"json": json.dumps(SCHEMA, separators=(",", ":"))}),
    ],
)
async def test_the_form_of_the_answer_reaches_the_engine(plane, monkeypatch, form, expected):
    seen = []
    (actor,) = plane.actors.values()
    submit = actor.submit

    async def spy(data: bytes) -> None:
        seen.extend(decode_submissions(data))
        await submit(data)

    monkeypatch.setattr(actor, "submit", spy)
    response = await whole(plane, saying("one", text={"format": form}))
    asked = seen[0].request.params.structured_outputs
    assert asked is None if expected is None else vars_of(asked) == expected
    assert response.text.format.model_dump(by_alias=True, exclude_none=True) == form


def vars_of(params: Any) -> dict[str, Any]:
    names = ("json", "json_object")
    return {name: value for name in names if (value := getattr(params, name)) is not None}


async def test_an_engine_that_is_lost_ends_the_stream_with_an_event(monkeypatch):
    async with open_plane(tokenizer=repeater(), step_s=0.002) as plane:
        run = plane.model.client.start

        def break_off(*args: Any) -> Any:
            return Broken(run(*args))

        monkeypatch.setattr(plane.model, "client", BrokenClient(plane.model.client, break_off))
        events = await streamed(plane, saying("one two three four five"))
    assert events[-1].type == "response.failed"
    assert events[-1].response.status == "failed"
    assert events[-1].response.error.code == "server_error"
    assert events[-1].response.output_text


class BrokenClient:
    """A client whose generations break off."""

    def __init__(self, client: Any, start: Any) -> None:
        self._client = client
        self.start = start

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


class Broken:
    """A generation that is lost after its third batch."""

    def __init__(self, generation: Any) -> None:
        self._generation = generation

    def __enter__(self) -> Any:
        self._inner = self._generation.__enter__()
        return self

    def __exit__(self, *reason: Any) -> Any:
        return self._generation.__exit__(*reason)

    def abort(self, ids: list[str]) -> None:
        self._inner.abort(ids)

    async def __aiter__(self) -> Any:
        count = 0
        async for deltas in self._inner:
            yield deltas
            if (count := count + 1) == 3:
                raise EngineDead("gone")


@pytest.mark.parametrize("stream", [False, True])
def test_every_place_with_every_nasty_value(target, stream):  # noqa: F811
    good = {"model": "m", "input": ITEMS, "text": {"format": {"type": "text"}}}
    good |= {"max_output_tokens": 2, "metadata": {"k": "v"}, "stream": stream}
    good |= {"tools": [ADD], "tool_choice": {"type": "function", "name": "add"}}
    good["input"] = [*ITEMS[1:4], CALLED, RESULT]
    assert target.request(method="POST", url=PATH, json=good).status_code == 200
    for path in places(good):
        for value in NASTY:
            body = copy.deepcopy(good)
            reduce(getitem, path[:-1], body)[path[-1]] = value  # type: ignore[index]
            target.post(PATH, json.dumps(body).encode())
    target.still_serves()
