"""Calls are found in the text of an answer, however it was divided, and nothing is lost."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.config import AppArgs, ModelOptions
from deployments.protocols.message_events import CallArguments, CallBegin, CallBroken, Event, Text
from deployments.protocols.tool_parsers import TOOL_CALL_PARSERS, guess_parser
from tests.deployments.test_json_scan import QUIET, cuts, divide, json_values

NAMES = ["get_weather", "add", "später"]
A = '{"name": "add", "arguments": {"a": 1, "b": "x}</tool_call>\\"{"}}'
W = '{"name": "get_weather", "parameters": {"city": "Zürich"}}'


def join(events: list[Event]) -> list[Event]:
    """The events with texts of the same kind put together."""
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(last, Text) and isinstance(event, Text):
            joined[-1] = Text(last.text + event.text)
        elif isinstance(last, CallArguments) and isinstance(event, CallArguments):
            joined[-1] = CallArguments(last.text + event.text)
        else:
            joined.append(event)
    return joined


def parse(name: str, pieces: list[str]) -> list[Event]:
    parser = TOOL_CALL_PARSERS[name](NAMES)
    events = [event for piece in pieces for event in parser.push(piece)]
    return join(events + parser.finish())


def in_each_way(name: str, text: str) -> list[Event]:
    """What the whole text tells, which is what its characters tell one by one."""
    whole = parse(name, [text])
    assert parse(name, list(text)) == whole
    return whole


def call(name: str, arguments: str) -> list[Event]:
    return [CallBegin(name), CallArguments(arguments)]


ADD = call("add", '{"a": 1, "b": "x}</tool_call>\\"{"}')
WEATHER = call("get_weather", '{"city": "Zürich"}')


@pytest.mark.parametrize(
    ("text", "events"),
    [
        ("", []),
        (" \n", [Text(" \n")]),
        ("just < text", [Text("just < text")]),
        ("ends with <tool_", [Text("ends with <tool_")]),
        (f"<tool_call>\n{A}\n</tool_call>", ADD),
        (f"\n\n<tool_call>{A}</tool_call>\n<tool_call>\n{W}\n</tool_call>\n", ADD + WEATHER),
        (f"Let me see.\n<tool_call>{W}</tool_call>", [Text("Let me see.\n"), *WEATHER]),
        (f"<tool_call>{W}</tool_call>\nDone.", [*WEATHER, Text("\nDone.")]),
        (f"<tool_call>{W}", WEATHER),
        (f"<tool_call>{W}</tool", WEATHER),
        (f"<tool_call>{W[:-1]}</tool_call>", WEATHER),
        (f"<tool_call>{W}}}}}</tool_call>", WEATHER),
        (f"<tool_call>{W}</tool_call>a <", [*WEATHER, Text("a <")]),
        ('<tool_call>{"arguments": {"a": [1]}, "name": "add"}', call("add", '{"a": [1]}')),
        ('<tool_call>{"name": "add"}</tool_call>', call("add", "{}")),
        ('<tool_call>{"name": "add", "arguments": null}', call("add", "{}")),
        ('<tool_call>{"id": [{}], "arguments": "{\\"a\\": 1}", "name": "add", "arguments": 5}',
         call("add", '{"a": 1}')),
        ('<tool_call>{"name": "sp\\u00e4ter", "arguments": {}}', call("später", "{}")),
        ('<tool_call>{"name": "unknown", "arguments": {}}', call("unknown", "{}")),
    ],
)  # fmt: skip
def test_hermes(text: str, events: list[Event]):
    assert in_each_way("hermes", text) == events


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "\n<tool_call> not json </tool_call>",
        "<tool_call>{'name': 'add'}</tool_call>",
        '<tool_call>{"name": "add", "arguments": 5}</tool_call>',
        '<tool_call>{"name": "add", "arguments": "{"}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {"a": }, "name": "add"}</tool_call>',
        '<tool_call>{"name": "ad',
    ],
)
def test_what_is_no_call_is_content(text: str):
    assert in_each_way("hermes", text) == [Text(text)]


def test_a_broken_call_does_not_hide_the_next():
    text = f"<tool_call>{{'name'}}</tool_call>\n<tool_call>{W}</tool_call>"
    assert in_each_way("hermes", text) == [
        Text("<tool_call>{'name'}</tool_call>\n"),
        *WEATHER,
    ]


@pytest.mark.parametrize(
    ("good", "rest"),
    [('{"a": ', "}}</tool_call>"), ('{"a": "x', "\n}</tool_call>"), ('{"a": [1', "")],
)
def test_a_call_that_breaks_late_is_told_whole(good: str, rest: str):
    begin = '<tool_call>{"name": "add", "arguments": '
    events = in_each_way("hermes", begin + good + rest)
    after = [Text(rest)] if rest else []
    assert events == [*call("add", good), CallBroken(begin + good), *after]


@pytest.mark.parametrize(
    ("text", "events"),
    [
        (W, WEATHER),
        (f"\n<|python_tag|>{W}", WEATHER),
        (f"{A}; {W}", ADD + WEATHER),
        (f"{A}\n{W},", ADD + WEATHER),
        (f"I call: <|python_tag|>{W}", [Text("I call: "), *WEATHER]),
        (f"I call: {W}", [Text(f"I call: {W}")]),
        (' {"name": "Bob", "age": 3}', [Text(' {"name": "Bob", "age": 3}')]),
        ('{"a": 1}', [Text('{"a": 1}')]),
        ("<|python_tag|>print(1)", [Text("<|python_tag|>print(1)")]),
        (f"{W} as you see", [*WEATHER, Text(" as you see")]),
    ],
)
def test_llama3_json(text: str, events: list[Event]):
    assert in_each_way("llama3_json", text) == events


BITS = [
    *("<tool_call>", "</tool_call>", "<|python_tag|>", A, W, W[:-1], "\n", " ", ";", "}", "{"),
    *('{"name": "add", "arguments": {"a": [', '"x', "text", "<tool", '\\"', ": 1", "]}}"),
]


@settings(QUIET, max_examples=400)
@given(st.sampled_from(sorted(TOOL_CALL_PARSERS)), st.lists(st.sampled_from(BITS)), cuts)
def test_events_do_not_depend_on_how_the_text_comes(name: str, bits: list[str], cuts: list[int]):
    text = "".join(bits)
    assert parse(name, divide(text, cuts)) == parse(name, [text])


arguments = st.dictionaries(st.text(), json_values)
calls = st.lists(st.tuples(st.sampled_from(NAMES), arguments), min_size=1, max_size=3)


@settings(QUIET, max_examples=40)
@given(calls, st.booleans(), cuts)
def test_every_call_is_found(calls: list[tuple[str, Any]], indented: bool, cuts: list[int]):
    layout = {"indent": 2 if indented else None, "ensure_ascii": indented}
    written = [json.dumps({"name": n, "arguments": a}, **layout) for n, a in calls]
    hermes = "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in written)
    expected = [e for n, a in calls for e in call(n, json.dumps(a))]
    for name, text in (("hermes", hermes), ("llama3_json", "; ".join(written))):
        events = [
            CallArguments(json.dumps(json.loads(e.text))) if isinstance(e, CallArguments) else e
            for e in parse(name, divide(text, cuts))
        ]
        assert events == expected


def test_the_template_tells_the_parser():
    assert guess_parser('return {"name": ...} within <tool_call></tool_call> tags') == "hermes"
    assert guess_parser("<tool_call>\n<function=name>") is None
    assert guess_parser("{{ '<|python_tag|>' }}") == "llama3_json"
    assert guess_parser("{{ messages }}") is guess_parser(None) is None


def test_options_of_a_model():
    args = AppArgs(tool_call_parser="hermes", reasoning_parser="qwen3")
    (model,) = args.models.values()
    assert (model.tool_call_parser, model.reasoning_parser) == ("hermes", "qwen3")
    for option in ("tool_call_parser", "reasoning_parser"):
        with pytest.raises(ValueError, match=r"there is no 'x'; take one of"):
            ModelOptions(**{option: "x"})
