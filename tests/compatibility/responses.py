"""Rows of `/v1/responses`."""

from __future__ import annotations

import json
from typing import Any

from tests.compatibility import vllm_fields
from tests.compatibility.chat import longer, shorter
from tests.compatibility.generation import says_the_same
from tests.compatibility.rows import (
    Seen,
    ends,
    ignored,
    invalid,
    is_json,
    refused,
    row,
    used,
    works,
)
from tests.compatibility.sampling import SCHEMA, TERSE, sampling_rows

ITEMS = [
    {"role": "developer", "content": "a"},
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "b"}]},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "c"}]},
    {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "d"}]},
    {"role": "user", "content": "e"},
]
IMAGE = [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]
FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object"}}


LOGPROBS = "message.output_text.logprobs"
FORCED = {"tools": [FUNCTION], "max_output_tokens": 64, **TERSE}


def logprobs(answer: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = answer["output"][-1]["content"][0]["logprobs"]
    return found


def calls(answer: Any) -> list[dict[str, Any]]:
    return [item for item in answer["output"] if item["type"] == "function_call"]


def calls_f(seen: Seen) -> bool:
    """Whether the answer calls the function with arguments that are JSON."""
    found = calls(seen.answer)
    return bool(found) and all(c["name"] == "f" and json.loads(c["arguments"]) == {} for c in found)


RESPONSES_ROWS = (
    row("model", works("m", lambda seen: seen.answer["model"] == "m"), note="Must be given."),
    row(
        "input",
        works("hi", lambda seen: ends(seen.answer) == "length"),
        works(ITEMS, lambda seen: used(seen.answer, "prompt") > 10),
        refused(IMAGE),
        note="Text, messages, and the items of earlier answers. 400 for images, audio and files.",
    ),
    row("instructions", works("abc", longer)),
    row(
        "max_output_tokens",
        works(2, lambda seen: used(seen.answer, "completion") == 2),
        invalid(511),
        note="400 if `max_model_len` leaves less room after the prompt.",
    ),
    row("stream", works(True, says_the_same)),
    row("stream_options", ignored({"include_obfuscation": False}, stream=True)),
    row(
        "text",
        works(
            {"format": {"type": "json_object"}}, is_json, slow=True, max_output_tokens=64, **TERSE
        ),
        works(
            {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
            is_json,
            slow=True,
            max_output_tokens=64,
            **TERSE,
        ),
        refused({"verbosity": "low"}),
        note="`format`. 400 for a `verbosity` other than `medium`.",
    ),
    row("metadata", works({"a": "b"}, lambda seen: seen.answer["metadata"] == {"a": "b"})),
    row(
        "include",
        works([LOGPROBS], lambda seen: len(logprobs(seen.answer)) == 4),
        refused([LOGPROBS], model="thinker"),
        ignored(["reasoning.encrypted_content"]),
        note="`message.output_text.logprobs`, but 400 where calls or thinking are looked for in the"
        " text. Others have no effect.",
    ),
    row("previous_response_id", refused("resp_1"), note="Nothing is kept: send the items again."),
    row("conversation", refused("conv_1"), note="Nothing is kept."),
    row("store", ignored(True), note="Nothing is kept; the answer says `false`."),
    row("background", ignored(False), refused(True), note="400 for true."),
    row("prompt", refused({"id": "pmpt_1"})),
    row(
        "reasoning",
        works({"effort": "low"}, longer),
        refused({"summary": "auto"}),
        note="`effort`, told to the chat template. 400 for a `summary`.",
    ),
    row(
        "tools",
        works([FUNCTION], longer),
        refused([{"type": "web_search"}]),
        note="Functions. 400 for the tools that OpenAI runs itself.",
    ),
    row(
        "tool_choice",
        works("none", shorter, tools=[FUNCTION]),
        works("required", calls_f, slow=True, **FORCED),
        works({"type": "function", "name": "f"}, calls_f, slow=True, **FORCED),
        refused({"type": "allowed_tools", "mode": "auto", "tools": [FUNCTION]}),
        invalid("required"),
        note="400 for OpenAI's `allowed_tools`. `none` keeps the tools from the model.",
    ),
    row(
        "parallel_tool_calls",
        works(
            False,
            lambda seen: len(calls(seen.answer)) == 1,
            slow=True,
            **FORCED,
            tool_choice="required",
        ),
    ),
    row("max_tool_calls", ignored(1), note="There are no built-in tools."),
    row(
        "top_logprobs",
        works(
            2,
            lambda seen: {len(t["top_logprobs"]) for t in logprobs(seen.answer)} == {2},
            include=[LOGPROBS],
        ),
        refused(1),
        note="Up to 20. 400 unless `include` asks for them.",
    ),
    row("truncation", ignored("disabled"), refused("auto"), note="400 for `auto`."),
    row(
        "context_management",
        ignored([]),
        refused([{"type": "compaction"}]),
        note="400 unless empty.",
    ),
    row("moderation", refused({"model": "x"})),
    row("service_tier", ignored("flex"), note="There is one tier."),
    row("safety_identifier", ignored("x"), note="Comes back with the answer."),
    row("user", ignored("x"), note="Comes back with the answer."),
    row("prompt_cache_key", ignored("x"), note="Comes back with the answer."),
    row("prompt_cache_options", ignored({"mode": "implicit"})),
    row("prompt_cache_retention", ignored("24h")),
    row("image", ignored({"context_compression": "auto"}), note="There is text only."),
    row("access_programs", ignored({})),
    row("enable_response_messages", ignored(False), refused(True), note="400 for true."),
    row("previous_input_messages", ignored([]), refused([{}]), note="400 unless empty."),
    row("previous_response", refused({"id": "x"}), note="Nothing is kept."),
    row("vllm_xargs", ignored({}), refused({"a": 1}), note="400 unless it is empty."),
    row("request_id", ignored("x"), note="Answers have ids of the server's own."),
    row("mm_processor_kwargs", ignored({"a": 1}), note="There is text only."),
    *(row for row in sampling_rows("max_output_tokens") if row.field in vllm_fields.RESPONSES),
)
