"""Rows of `/v1/embeddings`."""

from __future__ import annotations

import base64
import struct
from typing import Any

from tests.compatibility.rows import Seen, ignored, refused, row, used, works


def vector(answer: Any, index: int = 0) -> list[float]:
    """An embedding, however it is written."""
    found = answer["data"][index]["embedding"]
    if isinstance(found, str):
        data = base64.b64decode(found)
        return list(struct.unpack(f"<{len(data) // 4}f", data))
    return list(found)


def length(answer: Any) -> float:
    return float(sum(number**2 for number in vector(answer)) ** 0.5)


def is_the_same(seen: Seen) -> bool:
    pairs = zip(vector(seen.answer), vector(seen.without), strict=True)
    return all(abs(one - other) < 1e-6 for one, other in pairs)


EMBEDDINGS_ROWS = (
    row("model", works("m", lambda seen: seen.answer["model"] == "m"), note="Must be given."),
    row(
        "input",
        works("xy", lambda seen: used(seen.answer, "prompt") == 3),
        works(["x", "y"], lambda seen: vector(seen.answer) != vector(seen.answer, 1)),
        works([70, 71], lambda seen: used(seen.answer, "prompt") == 2),
        works([[70], [71]], lambda seen: len(seen.answer["data"]) == 2),
    ),
    row(
        "encoding_format",
        works("base64", is_the_same),
        works("float", is_the_same),
        refused("bytes"),
        note="`float` and `base64`. 400 for vLLM's `bytes`.",
    ),
    row("dimensions", works(4, lambda seen: len(vector(seen.answer)) == 4)),
    row("user", ignored("somebody")),
    row(
        "add_special_tokens",
        works(False, lambda seen: used(seen.answer, "prompt") == used(seen.without, "prompt") - 1),
    ),
    row("truncate_prompt_tokens", works(2, lambda seen: used(seen.answer, "prompt") == 2)),
    row("truncation_side", ignored("left"), refused("right"), note="400 for `right`."),
    row("padding", ignored("do_not_pad"), refused("max_length"), note="400 for `max_length`."),
    row("use_activation", ignored(True), refused(False), note="400 for false: see `normalize`."),
    row(
        "normalize",
        works(
            False,
            lambda seen: abs(length(seen.without) - 1) < 1e-5 < abs(length(seen.answer) - 1),
        ),
        note="vLLM's until 2026.",
    ),
    row("embed_dtype", ignored("float32"), refused("float16"), note="400 unless it is `float32`."),
    row("endianness", ignored("little"), refused("big"), note="400 for `big`."),
    row("messages", refused([{"role": "user", "content": "a"}]), note="Send texts as `input`."),
    row("priority", works(5, lambda seen: seen.request.priority == 5)),
    row("cache_salt", works("x", lambda seen: seen.request.cache_salt == "x")),
    row("request_id", ignored("x"), note="Answers have ids of the server's own."),
    row("mm_processor_kwargs", ignored({}), refused({"a": 1}), note="400 unless it is empty."),
    row("media_io_kwargs", ignored({"image": {}}), note="It is for `messages`."),
    row("add_generation_prompt", ignored(True), note="It is for `messages`."),
    row("continue_final_message", ignored(True), note="It is for `messages`."),
    row("chat_template", ignored("x"), note="It is for `messages`."),
    row("chat_template_kwargs", ignored({"a": 1}), note="It is for `messages`."),
)
