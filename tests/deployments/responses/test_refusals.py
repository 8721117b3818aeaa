"""What `/v1/responses` refuses, and what it lets pass."""

from __future__ import annotations

import copy
import json
from functools import reduce
from operator import getitem

import pytest

from tests.deployments.plane import MAX_MODEL_LEN
from tests.deployments.responses.asking import (
    ADD,
    CALLED,
    FORMAT,
    ITEMS,
    PATH,
    RESULT,
    WEATHER,
    refused,
    saying,
    whole,
)
from tests.deployments.test_hostile_bodies import NASTY, places, target  # noqa: F401

UNKEPT = {"type": "string", "pattern": "a", "minLength": 3}


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


async def test_no_hint_at_what_only_chats_have(plane):
    error = await refused(plane, max_output_tokens=0)
    assert error["message"] == "max_output_tokens must be a positive integer, got 0."


async def test_what_asks_for_nothing_is_accepted(plane):
    more = {"background": False, "tools": [], "tool_choice": "auto", "truncation": "disabled"}
    more |= {"reasoning": None, "include": ["reasoning.encrypted_content"], "conversation": None}
    more |= {"stream_options": {"include_obfuscation": False}, "text": {"verbosity": "medium"}}
    assert (await whole(plane, saying("one", **more))).output_text == "one"


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
