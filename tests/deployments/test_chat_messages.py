"""Chat answers with calls of functions and thinking, on the plane without Ray.

The chat template writes the last message alone and the fake core repeats it, token by token, so
that a test says in its message what the model is to answer.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import tokenizers

from deployments.ingress.message_style import MessageStyle
from deployments.wire import decode_submissions
from engine.tokenizer import Tokenizer
from tests.deployments.plane import Plane, bundled_tokenizer, open_plane

END = "§END"
PATH = "/v1/chat/completions"
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}},
}
ADD = {"type": "function", "function": {"name": "add", "description": "a + b"}}
TOOLS = [WEATHER, ADD]
CALL_1 = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich 🌧"}}\n</tool_call>'
CALL_2 = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call>'
BROKEN = '<tool_call>\n{"name": "add", "arguments": {"a": }}\n</tool_call>'


@pytest.fixture
async def plane() -> AsyncIterator[Plane]:
    async with open_plane(tokenizer=repeater()) as opened:
        opened.model.style = MessageStyle.of(opened.model.tokenizer, "hermes", None)
        yield opened


def repeater(template: str = "{{ messages[-1].content }}") -> Tokenizer:
    return Tokenizer(bundled_tokenizer()._backend, chat_template=template)


def saying(answer: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": answer + END}]
    return {"model": "m", "messages": messages, "stop": END, "tools": TOOLS, **more}


async def whole(plane: Plane, body: dict[str, Any]) -> dict[str, Any]:
    response = await plane.http.post(PATH, json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


async def streamed(plane: Plane, body: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """The deltas of a stream, and how it ended."""
    response = await plane.http.post(PATH, json={**body, "stream": True})
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    choices = [json.loads(line)["choices"][0] for line in lines]
    assert [c["finish_reason"] for c in choices[:-1]] == [None] * (len(choices) - 1)
    return [c["delta"] for c in choices], choices[-1]["finish_reason"]


def joined(deltas: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that deltas make up, as clients put it together."""
    assert deltas[0] == {"role": "assistant", "content": ""}
    texts = {key: "".join(d.get(key, "") for d in deltas) for key in ("content", "reasoning")}
    assert texts["reasoning"] == "".join(d.get("reasoning_content", "") for d in deltas)
    calls: list[dict[str, Any]] = []
    for change in (c for d in deltas for c in d.get("tool_calls", ())):
        if "id" in change:
            assert change["index"] == len(calls)
            calls.append({"id": change["id"], "type": change["type"], **change["function"]})
        else:
            calls[change["index"]]["arguments"] += change["function"]["arguments"]
    return {**texts, "calls": calls}


def named(calls: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    return [(call["name"], json.loads(call["arguments"])) for call in calls]


async def test_calls_are_taken_from_the_text(one_by_one, plane):
    body = saying(f"I look.\n{CALL_1}\n{CALL_2}")
    choice = await whole(plane, body)
    calls = choice["message"]["tool_calls"]
    assert choice["message"]["content"] == "I look.\n"
    assert choice["finish_reason"] == "tool_calls"
    expected = [("get_weather", {"city": "Zürich 🌧"}), ("add", {"a": 1, "b": [2]})]
    assert named([call["function"] for call in calls]) == expected
    assert len({call["id"] for call in calls}) == 2 and calls[0]["type"] == "function"

    deltas, reason = await streamed(plane, body)
    message = joined(deltas)
    assert (message["content"], reason) == ("I look.\n", "tool_calls")
    assert named(message["calls"]) == expected
    assert sum("tool_calls" in delta for delta in deltas) > 6  # arguments come in pieces


async def test_content_is_null_beside_calls(plane):
    choice = await whole(plane, saying(CALL_2))
    assert choice["message"]["content"] is None
    choice = await whole(plane, saying("Hello."))
    assert choice["message"] == {"role": "assistant", "content": "Hello."}
    assert choice["finish_reason"] == "stop"


async def test_what_is_no_valid_call_is_content(plane):
    choice = await whole(plane, saying(BROKEN))
    assert choice["message"] == {"role": "assistant", "content": BROKEN}
    assert choice["finish_reason"] == "stop"
    message = joined((await streamed(plane, saying(BROKEN)))[0])
    assert message["content"] == "}}\n</tool_call>"  # what could still be taken back
    deltas, reason = await streamed(plane, saying("<tool_call>nothing</tool_call>"))
    assert joined(deltas)["content"] == "<tool_call>nothing</tool_call>"
    assert reason == "stop"


async def test_a_call_that_is_cut_off(plane):
    body = saying(CALL_2, max_tokens=18)
    choice = await whole(plane, body)
    assert CALL_2.startswith(choice["message"]["content"]) and "a" in choice["message"]["content"]
    assert (choice["finish_reason"], "tool_calls" in choice["message"]) == ("length", False)
    assert (await streamed(plane, body))[1] == "length"


async def test_one_call_at_a_time(plane):
    body = saying(f"{CALL_1}\n{CALL_2}", parallel_tool_calls=False)
    calls = (await whole(plane, body))["message"]["tool_calls"]
    assert [call["function"]["name"] for call in calls] == ["get_weather"]
    message = joined((await streamed(plane, body))[0])
    assert named(message["calls"]) == [("get_weather", {"city": "Zürich 🌧"})]


@pytest.mark.parametrize("tools", [{"tools": None}, {"tools": []}, {"tool_choice": "none"}])
async def test_text_stays_text_where_nothing_may_be_called(plane, tools):
    choice = await whole(plane, saying(CALL_2, **tools))
    assert choice["message"] == {"role": "assistant", "content": CALL_2}
    message = joined((await streamed(plane, saying(CALL_2, **tools)))[0])
    assert message["content"] == CALL_2


async def test_text_stays_text_of_a_model_with_no_known_form(plane):
    plane.model.style = MessageStyle.of(plane.model.tokenizer)
    plane.model.tokenizer = repeater("{{ messages[-1].content }}{# tools #}")
    assert (await whole(plane, saying(CALL_2)))["message"]["content"] == CALL_2


async def test_every_completion_has_its_own_calls(plane):
    response = await plane.http.post(PATH, json=saying(CALL_1, n=3))
    ids = [c["message"]["tool_calls"][0]["id"] for c in response.json()["choices"]]
    assert len(set(ids)) == 3


async def test_logprobs_come_with_calls(plane):
    body = saying(CALL_2, logprobs=True)
    assert (await whole(plane, body))["logprobs"] == {"content": []}  # the fake core has none
    assert (await streamed(plane, body))[1] == "tool_calls"


LISTED = '[{"name":"add","arguments":{"a":1}},{"name":"add","arguments":{}}]'


@pytest.mark.parametrize(
    ("choice", "reason"),
    [("required", "tool_calls"), ({"type": "function", "function": {"name": "add"}}, "stop")],
)
async def test_calls_that_must_be(plane, monkeypatch, choice, reason):
    plane.model.style = MessageStyle.of(plane.model.tokenizer, "hermes", "qwen3")
    seen = []
    submit = plane.actors["e0"].submit
    monkeypatch.setattr(plane.actors["e0"], "submit", lambda d: (seen.append(d), submit(d))[1])
    body = saying(LISTED, tool_choice=choice)
    whole_answer = await whole(plane, body)
    assert (whole_answer["message"]["content"], whole_answer["finish_reason"]) == (None, reason)
    made = [call["function"] for call in whole_answer["message"]["tool_calls"]]
    deltas, streamed_reason = await streamed(plane, body)
    assert streamed_reason == reason
    for calls in (made, joined(deltas)["calls"]):
        assert named(calls) == [("add", {"a": 1}), ("add", {})]
    (submission,) = decode_submissions(seen[0])
    form = submission.request.params.structured_outputs
    schema = json.loads(form.json)
    names = [c["properties"]["name"]["const"] for c in schema["items"]["anyOf"]]
    assert names == (["add"] if reason == "stop" else ["get_weather", "add"])


async def test_thinking_is_told_apart(plane):
    plane.model.style = MessageStyle.of(plane.model.tokenizer, "hermes", "qwen3")
    body = saying(f"<think>\nhm <b>\n</think>\n\nSo:\n{CALL_2}")
    message = (await whole(plane, body))["message"]
    assert message["reasoning_content"] == message["reasoning"] == "\nhm <b>\n"
    assert message["content"] == "\n\nSo:\n" and len(message["tool_calls"]) == 1
    deltas = joined((await streamed(plane, body))[0])
    assert (deltas["reasoning"], deltas["content"]) == ("\nhm <b>\n", "\n\nSo:\n")
    assert named(deltas["calls"]) == [("add", {"a": 1, "b": [2]})]
    only = (await whole(plane, saying("<think>too long", tools=None)))["message"]
    assert (only["content"], only["reasoning"]) == (None, "too long")
    plain = (await whole(plane, saying("no thought", tools=None)))["message"]
    assert plain == {"role": "assistant", "content": "no thought"}


@pytest.mark.parametrize(
    ("end", "thought", "content"), [("<think>\n", "ab", "c"), ("</think>\n\n", None, "ab</think>c")]
)
async def test_templates_that_open_or_close_the_thinking(end, thought, content):
    turn = "{% if add_generation_prompt %}" + end + "{% endif %}"
    template = "{{ messages[-1].content }}" + turn
    async with open_plane(tokenizer=repeater(template)) as plane:
        plane.model.style = MessageStyle.of(plane.model.tokenizer, None, "qwen3")
        message = (await whole(plane, saying(f"ab</think>c{END}", tools=None)))["message"]
        assert (message.get("reasoning"), message["content"]) == (thought, content)


@pytest.mark.parametrize(
    ("begin", "thought", "content"),
    [
        ("<think>ab", "ab", None),
        ("<think>a</think>b", None, "<think>a</think>b"),
        ("ab", None, "ab"),
    ],
)
async def test_an_answer_to_go_on_with_says_whether_it_thinks(plane, begin, thought, content):
    plane.model.style = MessageStyle.of(plane.model.tokenizer, None, "qwen3")
    body = saying("", tools=None, continue_final_message=True, add_generation_prompt=False)
    body["messages"].append({"role": "assistant", "content": begin + END})
    message = (await whole(plane, body))["message"]  # the fake core says it all again
    assert (message.get("reasoning"), message["content"]) == (thought, content)


@pytest.mark.parametrize("special", [True, False])
async def test_marks_may_be_special_tokens(special):
    backend = tokenizers.Tokenizer.from_str(bundled_tokenizer()._backend.to_str())
    marks = ["<tool_call>", "</tool_call>"]
    add = backend.add_special_tokens if special else backend.add_tokens
    add(marks)
    tokenizer = Tokenizer(backend, chat_template="{{ messages[-1].content }}")
    async with open_plane(tokenizer=tokenizer) as plane:
        plane.model.vocab_size += 2
        plane.model.style = MessageStyle.of(tokenizer, "hermes", None)
        assert len((await whole(plane, saying(CALL_2)))["message"]["tool_calls"]) == 1


async def test_templates_get_tools_and_calls_as_they_expect_them():
    template = "{{ tools | tojson }}|{{ messages[:-1] | tojson }}"
    history = [
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}},
            {"id": "2", "type": "function", "function": {"name": "add", "arguments": "{"}},
            {"id": "3", "type": "function", "function": {"name": "add", "arguments": ""}},
        ]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "2"}]},
        {"role": "assistant", "content": "x", "reasoning": "hm", "tool_calls": []},
        {"role": "user", "content": "now?"},
    ]  # fmt: skip
    async with open_plane(tokenizer=repeater(template)) as plane:
        body = saying("", tools=[ADD]) | {"messages": history, "stop": "]now"}
        body["max_tokens"] = len(plane.model.tokenizer.encode_chat(history, tools=[ADD])) + 20
        plane.model.max_model_len = 2000
        text = (await whole(plane, body))["message"]["content"]
        tools, _, rest = text.partition("|")
        assert json.loads(tools) == [ADD]
        messages, _ = json.JSONDecoder().raw_decode(rest)
    calls = messages[0]["tool_calls"]
    assert [call["function"]["arguments"] for call in calls] == [{"a": 1}, "{", {}]
    assert messages[0]["content"] == ""
    assert messages[1]["content"] == "2"
    assert messages[2] == {
        **{"role": "assistant", "content": "x"},
        **{"reasoning": "hm", "reasoning_content": "hm"},
    }


@pytest.mark.parametrize(
    ("template", "role"),
    [("{{ messages[0].role }}", "system"), ("{{ messages[0].role }}{# developer #}", "developer")],
)
async def test_developers_speak_as_the_system_to_templates_that_know_none(template, role):
    async with open_plane(tokenizer=repeater(template)) as plane:
        messages = [{"role": "developer", "content": "x"}]
        body = {"model": "m", "messages": messages}
        body["max_tokens"] = len(bundled_tokenizer().encode(role))
        assert (await whole(plane, body))["message"]["content"] == role


async def test_thinking_may_be_left_out(plane):
    plane.model.style = MessageStyle.of(plane.model.tokenizer, None, "qwen3")
    body = saying("<think>hm</think>yes", tools=None, include_reasoning=False)
    assert (await whole(plane, body))["message"] == {"role": "assistant", "content": "yes"}
    message = joined((await streamed(plane, body))[0])
    assert (message["reasoning"], message["content"]) == ("", "yes")


async def test_an_answer_of_a_form_holds_no_thinking(plane):
    plane.model.style = MessageStyle.of(plane.model.tokenizer, None, "deepseek_r1")
    body = saying("{}", tools=None, response_format={"type": "json_object"})
    assert (await whole(plane, body))["message"] == {"role": "assistant", "content": "{}"}


async def test_tools_that_a_model_does_not_hear_of_change_nothing(plane):
    """Clients send them with every turn, whatever the model."""
    plane.model.style = MessageStyle.of(plane.model.tokenizer)
    for choice in ("none", "auto"):
        assert (await whole(plane, saying("a", tool_choice=choice)))["message"]["content"] == "a"


@pytest.mark.parametrize("role", ["critic", "User", "bot", ""])
@pytest.mark.parametrize("path", [PATH, "/tokenize"])
async def test_roles_that_nobody_knows_are_refused(plane, path, role):
    messages = [{"role": "user", "content": "a"}, {"role": role, "content": "b"}]
    response = await plane.http.post(path, json={"model": "m", "messages": messages})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "messages[1].role")
    assert "developer, system, user, assistant, tool, function" in error["message"]


async def test_roles_of_openai_s_and_those_that_the_template_names_are_taken(plane):
    for role in ("developer", "system", "user", "assistant", "tool", "function"):
        messages = [{"role": role, "content": "a"}]
        response = await plane.http.post("/tokenize", json={"messages": messages})
        assert response.status_code == 200, role
    plane.model.tokenizer = repeater("{{ messages[-1].content }}{# 'critic' #}")
    messages = [{"role": "critic", "content": "a"}]
    response = await plane.http.post("/tokenize", json={"messages": messages})
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": "x"}, "tools"),
        ({"tools": [1]}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "web_search", "function": {"name": "a"}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a" * 300}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]}, "tools"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "nope"}}}, "tool_choice"),
        ({"tool_choice": 1}, "tool_choice"),
        (
            {
                "tool_choice": "required",
                "tools": [
                    {"type": "function", "function": {"name": "a", "parameters": {"not": 1}}}
                ],
            },
            "tools",
        ),
        (
            {"tool_choice": "required", "response_format": {"type": "json_object"}},
            "response_format",
        ),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"functions": [{"name": "a"}]}, "functions"),
        ({"messages": [{"role": "assistant", "tool_calls": 1}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "messages"),
    ],
)
async def test_bad_fields_are_named(plane, change, param):
    response = await plane.http.post(PATH, json={**saying("a"), **change})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
