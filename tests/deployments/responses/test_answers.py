"""`/v1/responses` on the plane without Ray: texts, thinking and forms.

As in the tests of chats, the model repeats the last message up to a mark.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from deployments.ingress.message_style import MessageStyle
from deployments.wire import decode_submissions
from engine.errors import EngineDead
from tests.deployments.plane import open_plane
from tests.deployments.responses.asking import (
    FORMAT,
    ITEMS,
    SCHEMA,
    TOOLS,
    refused,
    saying,
    streamed,
    whole,
)
from tests.deployments.test_chat_messages import END, repeater
from tests.deployments.test_logprobs import LogprobCore


@pytest.fixture
async def slow_plane(one_by_one):
    """Tokens that come together would be told and counted together."""
    async with open_plane(tokenizer=repeater()) as plane:
        yield plane


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


async def test_events_come_in_openais_order(slow_plane):
    plane = slow_plane
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


async def test_thinking_is_an_item_of_its_own(slow_plane):
    plane = slow_plane
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


async def test_an_engine_that_is_lost_ends_the_stream_with_an_event(one_by_one, monkeypatch):
    async with open_plane(tokenizer=repeater()) as plane:
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
