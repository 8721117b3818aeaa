"""Rows of `/v1/chat/completions`."""

from __future__ import annotations

import json
from typing import Any

from tests.compatibility.generation import generation_rows
from tests.compatibility.rows import Seen, ignored, invalid, refused, row, used, works
from tests.compatibility.sampling import TERSE

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
NAMED = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
USER = {"role": "user", "content": "hi"}
PARTS = [{"type": "text", "text": "hi"}]
IMAGE = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
ROLES = [
    {"role": "system", "content": "a"},
    {"role": "developer", "content": "b"},
    {"role": "user", "content": PARTS},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "c"},
]
CONTINUED = [USER, {"role": "assistant", "content": "ab"}]


def longer(seen: Seen) -> bool:
    """Whether the model was told more."""
    return used(seen.answer, "prompt") > used(seen.without, "prompt")


def shorter(seen: Seen) -> bool:
    return used(seen.answer, "prompt") < used(seen.without, "prompt")


def calls(answer: Any) -> list[Any]:
    return list(answer["choices"][0]["message"].get("tool_calls") or ())


def calls_f(seen: Seen) -> bool:
    """Whether the answer calls the function with arguments that are JSON."""
    found = [call["function"] for call in calls(seen.answer)]
    return bool(found) and all(f["name"] == "f" and json.loads(f["arguments"]) == {} for f in found)


def alternatives(answer: Any) -> set[int]:
    """How many alternatives the tokens have."""
    return {len(token["top_logprobs"]) for token in answer["choices"][0]["logprobs"]["content"]}


def message(answer: Any) -> dict[str, Any]:
    found: dict[str, Any] = answer["choices"][0]["message"]
    return found


FORCED = {"tools": TOOLS, "max_tokens": 64, **TERSE}
CHAT_ROWS = (
    row("model", works("m", lambda seen: seen.answer["model"] == "m"), note="Must be given."),
    row(
        "messages",
        works([USER], lambda seen: used(seen.answer, "prompt") > 2),
        works(ROLES, lambda seen: used(seen.answer, "prompt") > 20),
        refused([{"role": "user", "content": IMAGE}]),
        refused([{"role": "critic", "content": "a"}], "messages[0].role"),
        invalid([]),
        note="Roles `system`, `developer`, `user`, `assistant`, `tool`, `function`, and those that"
        " the chat template names; parts of text. 400 for images, audio and files.",
    ),
    row(
        "max_completion_tokens",
        works(2, lambda seen: used(seen.answer, "completion") == 2, max_tokens=None),
        invalid(511, max_tokens=None),
        invalid(2, "max_tokens"),
        note="400 if `max_model_len` leaves less room after the prompt. With neither the answer may"
        " fill that.",
    ),
    row(
        "logprobs",
        works(True, lambda seen: alternatives(seen.answer) == {0}),
    ),
    row(
        "top_logprobs",
        works(2, lambda seen: alternatives(seen.answer) == {2}, logprobs=True),
        invalid(2),
        note="Up to 20.",
    ),
    row(
        "tools",
        works(TOOLS, longer),
        refused([{"type": "custom", "custom": {"name": "f"}}]),
        note="Functions, for models whose chat template knows tools. 400 for `custom` tools.",
    ),
    row(
        "tool_choice",
        works("none", shorter, tools=TOOLS),
        ignored("auto", tools=TOOLS),
        works("required", calls_f, slow=True, **FORCED),
        works(NAMED, calls_f, slow=True, **FORCED),
        refused({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": TOOLS}}),
        invalid("required"),
        note="`none` keeps the tools from the model. 400 for OpenAI's `allowed_tools`.",
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
    row(
        "reasoning_effort",
        works("low", longer),
        invalid("extreme"),
        note="Told to the chat template, as `reasoning_effort` and `enable_thinking`.",
    ),
    row(
        "include_reasoning",
        works(
            False,
            lambda seen: (
                bool(message(seen.without)["reasoning_content"])
                and "reasoning_content" not in message(seen.answer)
            ),
            model="thinker",
            chat_template_kwargs={"think": True},
        ),
        note="For models with a `reasoning_parser`.",
    ),
    row("documents", works([{"title": "a", "text": "b"}], longer)),
    row("chat_template_kwargs", works({"extra": "abc"}, longer)),
    row(
        "chat_template",
        refused("x"),
        note="Taken where the server's `allow_request_chat_templates` is set.",
    ),
    row("add_generation_prompt", works(False, shorter)),
    row("continue_final_message", works(True, shorter, messages=CONTINUED)),
    row(
        "echo",
        ignored(False),
        refused(True),
        note="400 for true, which in vLLM repeats the last message.",
    ),
    row("add_special_tokens", ignored(False), refused(True), note="400 for true."),
    row("best_of", ignored(1), refused(2), note="400 unless it is 1."),
    row("functions", ignored([]), refused([{"name": "f"}]), note="400: `tools` replaced it."),
    row(
        "function_call",
        ignored("auto"),
        refused({"name": "f"}),
        note="400 unless it is `none` or `auto`: `tool_choice` replaced it.",
    ),
    row("audio", refused({"voice": "x", "format": "wav"})),
    row(
        "modalities",
        ignored(["text"]),
        refused(["text", "audio"]),
        note='400 unless it is `["text"]`.',
    ),
    row("prediction", refused({"type": "content", "content": "x"})),
    row("moderation", refused({"model": "x"})),
    row("verbosity", ignored("medium"), refused("low"), note="400 unless it is `medium`."),
    row("web_search_options", refused({})),
    row("return_prompt_text", ignored(False), refused(True), note="400 for true."),
    row("metadata", ignored({"a": "b"})),
    row("store", ignored(True), note="Nothing is kept."),
    row("service_tier", ignored("flex"), note="There is one tier."),
    row("safety_identifier", ignored("x")),
    row("prompt_cache_key", ignored("x"), note="Chats return to the engine that has their prefix."),
    row("prompt_cache_options", ignored({"mode": "implicit"})),
    row("prompt_cache_retention", ignored("24h")),
    row("media_io_kwargs", ignored({"image": {}}), note="There is text only."),
    row("mm_processor_kwargs", ignored({"a": 1}), note="There is text only."),
    *generation_rows(logprobs=True),
)
