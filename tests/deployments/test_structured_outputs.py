"""The fields that ask for a form of the output, and what the engine is asked for them."""

import json

import pytest

from deployments.protocols.body import parse_body
from deployments.protocols.openai import ChatBody, CompletionBody
from deployments.protocols.simple import BatchGenerateBody, GenerateBody
from deployments.protocols.structured_outputs import with_form
from engine.errors import InvalidRequest
from engine.sampling_params import SamplingParams
from engine.structured_outputs.params import StructuredOutputsParams

SCHEMA = {"type": "object", "properties": {"b": {}, "a": {}}}
TEXT = json.dumps(SCHEMA, separators=(",", ":"))
NAMED = {"name": "x", "schema": SCHEMA, "strict": True}
ASKED = [
    ({"response_format": {"type": "json_object"}}, {"json_object": True}),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": SCHEMA},
            }
        },
        {"json": TEXT},
    ),
    ({"structured_outputs": {"json": SCHEMA, "regex": None}}, {"json": TEXT}),
    (
        {"structured_outputs": {"json": "{}", "disable_any_whitespace": True}},
        {"json": "{}", "disable_any_whitespace": True},
    ),
    ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ["a", "b"]}),
    ({"guided_json": SCHEMA}, {"json": TEXT}),
    ({"guided_json": TEXT}, {"json": TEXT}),
    ({"guided_regex": "a+"}, {"regex": "a+"}),
    ({"guided_choice": ["a"]}, {"choice": ["a"]}),
    ({"guided_grammar": 'root ::= "a"'}, {"grammar": 'root ::= "a"'}),
    ({"guided_grammar": None, "response_format": {"type": "text"}}, None),
]
BODIES = {
    CompletionBody: {"model": "m", "prompt": "hi"},
    ChatBody: {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    GenerateBody: {"prompt": "hi"},
    BatchGenerateBody: {"prompts": ["hi"]},
}


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize(("fields", "asked"), ASKED)
def test_every_endpoint_takes_every_way_to_ask(kind, fields, asked):
    body = parse_body(kind, json.dumps({**BODIES[kind], **fields}).encode())
    expected = asked and StructuredOutputsParams(**asked, param=next(iter(fields)))
    assert body.to_params().structured_outputs == expected


def test_text_goes_with_another_form():
    fields = {"response_format": {"type": "text"}, "guided_regex": "a"}
    body = parse_body(ChatBody, json.dumps({**BODIES[ChatBody], **fields}).encode())
    assert body.to_params().structured_outputs.regex == "a"


def test_a_tool_may_ask_for_a_form_unless_the_request_does():
    form = StructuredOutputsParams(json=SCHEMA, param="tool_choice")
    assert with_form(SamplingParams(), form).structured_outputs == form
    asked = StructuredOutputsParams(regex="a", param="guided_regex")
    with pytest.raises(InvalidRequest, match="tool_choice and guided_regex") as caught:
        with_form(SamplingParams(structured_outputs=asked), form)
    assert caught.value.param == "guided_regex"
