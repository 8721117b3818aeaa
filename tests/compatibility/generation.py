"""Rows of the fields that completions and chats share."""

from __future__ import annotations

from tests.compatibility.rows import (
    Row,
    Seen,
    ends,
    ignored,
    invalid,
    is_json,
    refused,
    row,
    text,
    used,
    works,
)
from tests.compatibility.sampling import (
    BOS,
    JSON_SCHEMA,
    MOSTLY_D,
    TERSE,
    D,
    guided_rows,
    sampling_rows,
)


def says_the_same(seen: Seen) -> bool:
    return isinstance(seen.answer, list) and text(seen.answer) == text(seen.without)


def tells_usage(seen: Seen) -> bool:
    return seen.answer[-1]["choices"] == [] and used(seen.answer[-1], "completion") == 4


def has_token_ids(seen: Seen) -> bool:
    return len(seen.answer["choices"][0]["token_ids"]) == 4


def generation_rows(logprobs: int) -> tuple[Row, ...]:
    """The rows; `logprobs` is what asks for them."""
    return (
        *sampling_rows("max_tokens"),
        *guided_rows("max_tokens"),
        row(
            "max_tokens",
            works(2, lambda seen: used(seen.answer, "completion") == 2),
            invalid(511),
            note="400 if `max_model_len` leaves less room after the prompt.",
        ),
        row("n", works(2, lambda seen: len(seen.answer["choices"]) == 2), note="Up to 128."),
        row("user", ignored("somebody")),
        row("stream", works(True, says_the_same)),
        row(
            "stream_options",
            works({"include_usage": True}, tells_usage, stream=True),
            works(
                {"include_usage": True, "continuous_usage_stats": True},
                lambda seen: all("usage" in chunk for chunk in seen.answer),
                stream=True,
            ),
            invalid({"include_usage": True}),
            note="OpenAI's `include_obfuscation` has no effect.",
        ),
        row(
            "response_format",
            works({"type": "json_object"}, is_json, slow=True, max_tokens=64, **TERSE),
            works(JSON_SCHEMA, is_json, slow=True, max_tokens=64, **TERSE),
            ignored({"type": "text"}),
            refused({"type": "structural_tag", "format": {}}),
            note="`text`, `json_object` and `json_schema`. 400 for vLLM's `structural_tag`.",
        ),
        row(
            "prompt_logprobs",
            works(0, lambda seen: "prompt_logprobs" in str(seen.answer)),
            refused(0, stream=True),
            note="400 with `stream`.",
        ),
        row("return_token_ids", works(True, has_token_ids)),
        row(
            "truncate_prompt_tokens",
            works(2, lambda seen: used(seen.answer, "prompt") == 2),
            works(-1, lambda seen: ends(seen.answer) == "length"),
            note="Keeps the last tokens; -1 what leaves room for the output.",
        ),
        row(
            "truncation_side",
            ignored("left"),
            refused("right"),
            note="400 for `right`: the last tokens are kept.",
        ),
        *_vllm_rows(logprobs),
    )


def _vllm_rows(logprobs: int) -> tuple[Row, ...]:
    """Of fields that vLLM adds, what is taken in part, refused, or without effect."""
    return (
        row("use_beam_search", ignored(False), refused(True), note="400 unless it is false."),
        row("length_penalty", ignored(1), refused(2.0), note="400 unless it is 1."),
        row("allowed_token_ids", works([D], lambda seen: text(seen.answer) == "dddd")),
        row("bad_words", works(["d"], lambda seen: "d" not in text(seen.answer), **MOSTLY_D)),
        row("logprob_token_ids", refused([70])),
        row("logits_processors", refused(["x"])),
        row("structural_tag", refused("{}")),
        row("guided_whitespace_pattern", refused(" ?")),
        row("guided_decoding_backend", ignored("xgrammar"), note="It is always xgrammar."),
        row(
            "spaces_between_special_tokens",
            ignored(True, skip_special_tokens=False, logit_bias={str(BOS): 100}),
            ignored(False, skip_special_tokens=False, logit_bias={str(BOS): 100}),
            note="There are none.",
        ),
        row(
            "return_tokens_as_token_ids",
            works(True, lambda seen: "token_id:" in str(seen.answer), logprobs=logprobs),
        ),
        row("repetition_detection", refused({"max_pattern_size": 2})),
        row("thinking_token_budget", ignored(-1), refused(5), note="400 unless it is -1."),
        row("watermarking", ignored(False), refused(True), note="400 for true."),
        row("vllm_xargs", ignored({}), refused({"a": 1}), note="400 unless it is empty."),
        row("request_id", ignored("x"), note="Answers have ids of the server's own."),
        row("session_id", ignored("x")),
        row("stream_interval", ignored(2), note="A slow reader gets larger chunks anyway."),
        row("return_token_offsets", ignored(True), note="In vLLM it is for `/render` alone."),
        row("return_mm_kwargs", ignored(True), note="In vLLM it is for `/render` alone."),
        row("routed_experts_prompt_start", ignored(1)),
        row("kv_transfer_params", ignored({}), refused({"a": 1}), note="400 unless it is empty."),
        row("ec_transfer_params", ignored({}), refused({"a": 1}), note="400 unless it is empty."),
    )
