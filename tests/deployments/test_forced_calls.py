"""The JSON schema of an answer that must be calls of functions."""

from __future__ import annotations

import json

import jsonschema
import pytest
import xgrammar

from deployments.protocols import tool_calls
from deployments.protocols.tool_calls import read_tool_use
from engine.structured_outputs.params import StructuredOutputsParams

ADD = {"type": "function", "function": {"name": "add", "description": "a + b"}}


def test_the_form_of_calls_that_must_be():
    parameters = {
        "properties": {"x": {"$ref": "#/$defs/X"}},
        "$defs": {"X": {"type": "integer"}},
    }
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}, ADD]
    use = read_tool_use(tools, "required", None)
    schema = use.schema()
    assert "maxItems" not in schema
    jsonschema.validate([{"name": "f", "arguments": {"x": 1}}], schema)
    jsonschema.validate([{"name": "add", "arguments": {}}] * 2, schema)
    for wrong in (
        *([], {}, [{"name": "f"}], [{"name": "g", "arguments": {}}]),
        [{"name": "f", "arguments": {"x": "a"}}],
        [{"name": "f", "arguments": [1]}],
        [{"name": "add", "arguments": {"x": 1}}],
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)
    assert read_tool_use(tools, "required", False).schema()["maxItems"] == 1
    choice = {"type": "function", "function": {"name": "add"}}
    assert read_tool_use(tools, choice, None).schema()["maxItems"] == 1


OTHER = {"$ref": "#/$defs/X"}
TREE = {
    "properties": {
        "$ref": {"type": "integer"},
        "child": {"$ref": "#"},
        "same": {
            "anyOf": [
                {"$ref": "#/properties/$ref"},
                {"type": "array", "items": {"$ref": "#/$defs/X"}},
            ]
        },
        "is": {"const": {"$ref": "#"}},
    },
    "additionalProperties": OTHER,
    "$defs": {"X": {"type": "string"}},
}


@pytest.mark.parametrize(
    ("arguments", "fits"),
    [
        ({"child": {"child": {"$ref": 1}}}, True),
        ({"child": [{"name": "tree", "arguments": {}}]}, False),
        ({"same": 1}, True),
        ({"same": ["a"]}, True),
        ({"same": "a"}, False),
        ({"is": {"$ref": "#"}}, True),
        ({"other": "a"}, True),
        ({"other": 1}, False),
    ],
)
def test_parameters_may_refer_to_themselves(arguments, fits):
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {**TREE, "$defs": {"X": x}}}}
        for name, x in (("other", {"type": "integer"}), ("tree", {"type": "string"}))
    ]
    schema = read_tool_use(tools, "required", None).schema()
    call = [{"name": "tree", "arguments": arguments}]
    assert jsonschema.Draft202012Validator(schema).is_valid(call) == fits
    text = json.dumps(call).replace(': "#"', ':"#"')  # xgrammar writes constants without spaces
    StructuredOutputsParams(json=schema).check()
    grammar = xgrammar.Grammar.from_json_schema(json.dumps(schema), any_whitespace=False)
    letters = xgrammar.TokenizerInfo([*map(chr, range(32, 127)), "</s>"], stop_token_ids=[95])
    matcher = xgrammar.GrammarMatcher(xgrammar.GrammarCompiler(letters).compile_grammar(grammar))
    assert matcher.accept_string(text) == fits


@pytest.mark.parametrize("schema", [{"anyOf": [{"$ref": "#"}] * 20_000}, {"anyOf": [{}] * 1000}])
def test_only_parameters_that_matter_are_looked_through(monkeypatch, schema):
    """It takes long: not those that will be refused for their length, nor those without `$ref`."""
    monkeypatch.setattr(tool_calls, "rebase", None)
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    assert read_tool_use([tool], "required", None).schema()["$defs"] == {"0": schema}
