"""Rows of `/tokenize` and `/detokenize`, which only vLLM has."""

from __future__ import annotations

from typing import Any

from tests.compatibility.chat import TOOLS
from tests.compatibility.rows import ignored, refused, row, works

MESSAGES = [{"role": "user", "content": "hi"}]
CONTINUED = [*MESSAGES, {"role": "assistant", "content": "ab"}]
CHAT: dict[str, Any] = {"prompt": None, "messages": MESSAGES}


def count(answer: dict[str, int]) -> int:
    return answer["count"]


TOKENIZE_ROWS = (
    row(
        "model",
        works("m", lambda seen: count(seen.answer) > 0),
        note="May be left out when one model is served.",
    ),
    row("prompt", works("ab", lambda seen: seen.answer["tokens"] == [1, 273])),
    row("messages", works(MESSAGES, lambda seen: count(seen.answer) > 2, prompt=None)),
    row(
        "add_special_tokens",
        works(False, lambda seen: count(seen.answer) == count(seen.without) - 1),
        works(True, lambda seen: count(seen.answer) == count(seen.without) + 1, **CHAT),
    ),
    row("return_token_strs", works(True, lambda seen: seen.answer["token_strs"][1] == "ab")),
    row(
        "add_generation_prompt",
        works(False, lambda seen: count(seen.answer) < count(seen.without), **CHAT),
    ),
    row(
        "continue_final_message",
        works(
            True,
            lambda seen: count(seen.answer) < count(seen.without),
            prompt=None,
            messages=CONTINUED,
        ),
    ),
    row(
        "chat_template",
        refused("x", **CHAT),
        note="Taken where the server's `allow_request_chat_templates` is set.",
    ),
    row(
        "chat_template_kwargs",
        works({"extra": "abc"}, lambda seen: count(seen.answer) > count(seen.without), **CHAT),
    ),
    row("tools", works(TOOLS, lambda seen: count(seen.answer) > count(seen.without), **CHAT)),
    row("media_io_kwargs", ignored({"image": {}}), note="There is text only."),
    row("mm_processor_kwargs", ignored({"a": 1}), note="There is text only."),
)
DETOKENIZE_ROWS = (
    row(
        "model",
        works("m", lambda seen: seen.answer["prompt"] == "de"),
        note="May be left out when one model is served.",
    ),
    row("tokens", works([70], lambda seen: seen.answer["prompt"] == "d")),
)
