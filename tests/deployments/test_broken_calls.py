"""Calls that turn out to be none: streams and whole answers, of chats and responses, agree."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from deployments.ingress.message_style import MessageForm
from deployments.ingress.messages import MessageDeltas, whole_message
from deployments.ingress.response_items import Output
from deployments.ingress.served import Piece
from deployments.protocols.tool_calls import ToolUse
from deployments.protocols.tool_parsers.hermes import HermesParser
from engine.output_processor import TextDelta
from engine.outputs import CompletionOutput

TOOL: Any = {"type": "function", "function": {"name": "f"}}
FIRST = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
SECOND = '<tool_call>{"name": "f", "arguments": {"a": 2}}</tool_call>'
BROKEN = '<tool_call>{"name": "f", "arguments": {"a": oops}}</tool_call>'
REST = "}}</tool_call>"
"""Of a broken call that a stream has begun to tell: what could still be taken back."""
Told = tuple[str, list[str]]
"""Content, and the arguments of calls."""


def form(parallel: bool) -> MessageForm:
    return MessageForm(HermesParser, ToolUse([TOOL], "auto", parallel=parallel), None, None)


def whole_chat(text: str, parallel: bool) -> tuple[*Told, str | None]:
    output = CompletionOutput(index=0, text=text, finish_reason="stop")
    message, reason = whole_message(form(parallel), output)
    calls = [call["function"]["arguments"] for call in message.get("tool_calls", [])]
    return message["content"] or "", calls, reason


def streamed_chat(text: str, parallel: bool) -> tuple[*Told, str | None]:
    deltas = MessageDeltas(form(parallel))
    content, calls = "", []
    for delta in [*(d for c in text for d in deltas.push(c, False)), *deltas.push("", True)]:
        content += delta.get("content", "")
        for change in delta.get("tool_calls", []):
            if "id" in change:
                assert change["index"] == len(calls)
                calls.append("")
            calls[change["index"]] += change["function"]["arguments"]
    return content, calls, deltas.finish_reason("stop")


def responded(text: str, parallel: bool, is_streamed: bool) -> Told:
    output = Output(form(parallel), lambda entries: [], is_streamed)
    job: Any = SimpleNamespace(processors={})
    for delta in [*map(TextDelta, text), TextDelta(finish_reason="stop")]:
        for _ in output.push(Piece(0, job, delta)):
            pass
    messages = [item for item in output.items if item["type"] == "message"]
    content = "".join(message["content"][0]["text"] for message in messages)
    return content, [i["arguments"] for i in output.items if i["type"] == "function_call"]


@pytest.mark.parametrize("parallel", [False, True])
def test_a_call_after_a_broken_one_is_told(parallel):
    text = f"{BROKEN}\n{SECOND}"
    assert whole_chat(text, parallel) == (f"{BROKEN}\n", ['{"a": 2}'], "tool_calls")
    assert responded(text, parallel, False) == (f"{BROKEN}\n", ['{"a": 2}'])
    begun = '{"a": oops'
    content, calls, reason = streamed_chat(text, parallel)
    assert (content, calls, reason) == (f"{REST}\n", [begun, '{"a": 2}'], "tool_calls")
    assert responded(text, parallel, True) == (content, calls)


def test_one_valid_call_is_told_wherever_it_stands():
    text = f"{BROKEN}\n{FIRST}\n{BROKEN}\n{SECOND}"
    content, calls, reason = streamed_chat(text, False)
    assert (calls[1:], reason) == (['{"a": 1}'], "tool_calls")
    assert responded(text, False, True) == (content, calls)
    assert whole_chat(text, False)[1] == responded(text, False, False)[1] == calls[1:]


def test_a_broken_call_of_which_nothing_was_told_is_content():
    text = f"{FIRST}\n{BROKEN}"
    told = whole_chat(text, False)
    assert told == (f"\n{BROKEN}", ['{"a": 1}'], "tool_calls")
    assert streamed_chat(text, False) == told
    assert responded(text, False, False) == responded(text, False, True) == told[:2]


def test_a_stream_of_broken_calls_alone_asks_for_no_call():
    content, calls, reason = streamed_chat(f"{BROKEN}{BROKEN}", False)
    assert (content, len(calls), reason) == (REST * 2, 2, "stop")
