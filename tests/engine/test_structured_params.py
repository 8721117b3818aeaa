"""What may be asked of an output's form, and what is refused before anything is compiled."""

import itertools
import json

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InvalidRequest
from engine.sampling_params import SamplingParams
from engine.structured_outputs import json_schema
from engine.structured_outputs.params import (
    MAX_CHOICES,
    MAX_GRAMMAR_LENGTH,
    GrammarSource,
    StructuredOutputsParams,
)


@pytest.mark.parametrize(
    ("options", "source"),
    [
        ({"json": {"type": "null"}}, GrammarSource("json", '{"type":"null"}')),
        ({"json": '{"a": 1}'}, GrammarSource("json", '{"a": 1}')),
        ({"json_object": True}, GrammarSource("json", '{"type":"object"}')),
        (
            {"json": "{}", "disable_any_whitespace": True, "json_object": False},
            GrammarSource("json", "{}", any_whitespace=False),
        ),
        ({"regex": "a+"}, GrammarSource("regex", "a+")),
        ({"grammar": 'root ::= "a"'}, GrammarSource("grammar", 'root ::= "a"')),
        ({"choice": ["a", 'é"\n']}, GrammarSource("grammar", 'root ::= "a" | "é\\"\\n"')),
    ],
)
def test_sources(options, source):
    params = StructuredOutputsParams(**options)
    params.check()
    assert params.source() == source
    wire = SamplingParams(structured_outputs=params)
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(wire), type=SamplingParams)
    assert again.structured_outputs.source() == source


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "none"),
        ({"json_object": False}, "none"),
        ({"json": "{}", "regex": "a"}, "json and regex"),
        ({"json": 3}, "json must be a text"),
        ({"regex": ""}, "regex must be"),
        ({"choice": []}, "choice must be a list"),
        ({"choice": "ab"}, "choice must be a list"),
        ({"choice": ["a", ""]}, "choice must be texts"),
        ({"choice": ["a"] * (MAX_CHOICES + 1)}, f"{MAX_CHOICES} texts"),
        ({"grammar": "a" * (MAX_GRAMMAR_LENGTH + 1)}, f"{MAX_GRAMMAR_LENGTH} characters"),
        ({"json_object": 1}, "json_object must be"),
        ({"regex": "a", "disable_any_whitespace": 1}, "disable_any_whitespace"),
    ],
)
def test_refuses(options, words):
    with pytest.raises(InvalidRequest, match=words) as caught:
        StructuredOutputsParams(**options, param="guided_json")
    assert caught.value.param == "guided_json"
    assert caught.value.message.startswith("guided_json: ")


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ('{"type":', "not valid JSON at character 8"),
        ("[" * 100_000, "not valid JSON"),
        ("3", "must be an object"),
        ({"uniqueItems": True}, "uniqueItems"),
        ({"properties": {"not": {"properties": {"a": {"not": {}}}}}}, "uses not"),
        ({"items": {"anyOf": [{"if": {}}]}}, "uses if"),
        ({"$defs": {"a": {"contains": {}}}}, "contains"),
        ({"allOf": [{}, {}]}, "allOf"),
        ({"allOf": None}, "allOf that is no list"),
        ({"items": {"allOf": 5}}, "allOf that is no list"),
        ({"$ref": "https://example.com/schema"}, "another document"),
        ({"type": "object", "anyOf": [{}]}, "type beside anyOf"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "pattern beside"),
        ({"type": "string", "pattern": '^"$'}, "pattern with a quote"),
        ({"type": "string", "pattern": r"a\\\\b"}, "a backslash"),
        ({"type": "object", "patternProperties": {r"\n": {}}}, "a line break"),
    ],
)
def test_refuses_schemas_that_would_not_be_kept(schema, words):
    text = schema if isinstance(schema, str) else json.dumps(schema)
    with pytest.raises(InvalidRequest, match=words):
        StructuredOutputsParams(json=text).check()


KEYWORDS = sorted(
    json_schema._LOOKED_AT
    | json_schema._ASSERTIONS
    | {"$schema", "$id", "$anchor", "default", "else", "then", "description", "examples", "title"}
)
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -(10**400)])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYWORDS) | st.text(), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(KEYWORDS), VALUES, min_size=1, max_size=3))
def test_whatever_a_keyword_has_is_taken_or_refused_in_a_sentence(schema):
    try:
        json_schema.check_schema(json.dumps(schema))
    except ValueError as error:
        assert str(error).endswith(".")


def test_no_keyword_has_a_value_that_breaks_the_check():
    values = (None, True, 0, 1.5, "x", [], {}, [None], {"a": 5}, 10**400)
    for keyword, value in itertools.product(KEYWORDS, values):
        for schema in ({keyword: value}, {"items": {keyword: value}}):
            try:
                json_schema.check_schema(json.dumps(schema))
            except ValueError as error:
                assert str(error).endswith(".")


def test_takes_what_pydantic_writes():
    schema = {
        "$defs": {"A": {"properties": {"not": {"title": "Not"}}, "type": "object"}},
        "properties": {
            "a": {"$ref": "#/$defs/A", "description": "one"},
            "b": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None, "title": "B"},
            "d": {"type": "string", "pattern": r"^[^\n]\d+\.$"},
            "c": {"allOf": [{"$ref": "#/$defs/A"}]},
        },
        "required": ["a"],
        "title": "Answer",
        "type": "object",
    }
    StructuredOutputsParams(json=schema).check()


def test_deep_schemas_are_looked_through_without_recursion():
    schema = "{" + '"items":{' * 900 + '"not":{}' + "}" * 900 + "}"
    with pytest.raises(InvalidRequest, match="uses not"):
        StructuredOutputsParams(json=schema).check()


def test_sampling_params_take_no_mapping():
    with pytest.raises(InvalidRequest, match="StructuredOutputsParams"):
        SamplingParams(structured_outputs={"regex": "a"})
