"""Log-probabilities in the two forms that OpenAI's API has for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.outputs import Logprob


def chat_logprobs(
    entries: list[dict[int, Logprob]], num_top: int, token_bytes: Mapping[int, bytes]
) -> dict[str, Any]:
    """The form of chat completions; the sampled token comes first in each entry.

    `bytes` are the token's own, taken from `token_bytes`: clients join them where a character
    spans tokens, whose texts show it as U+FFFD.
    """
    content = []
    for entry in entries:
        tokens = [_chat_token(item, token_bytes[token]) for token, item in entry.items()]
        ranked = sorted(tokens, key=lambda token: -token["logprob"])
        content.append({**tokens[0], "top_logprobs": ranked[:num_top]})
    return {"content": content}


def completion_logprobs(
    entries: list[dict[int, Logprob]], num_top: int, offset: int
) -> dict[str, Any]:
    """The form of text completions; `offset` is the length of the text so far."""
    sampled = [next(iter(entry.values())) for entry in entries]
    offsets = []
    for item in sampled:
        offsets.append(offset)
        offset += len(item.decoded_token or "")
    return {
        "tokens": [item.decoded_token for item in sampled],
        "token_logprobs": [item.logprob for item in sampled],
        "top_logprobs": [_top(entry, num_top) for entry in entries] if num_top else None,
        "text_offset": offsets,
    }


def prompt_logprobs(
    entries: list[dict[int, Logprob] | None] | None,
) -> list[dict[str, dict[str, Any]] | None] | None:
    """vLLM's form: for each prompt position, token id → its log-probability, rank and text."""
    if entries is None:
        return None
    return [_prompt_entry(entry) if entry else None for entry in entries]


def _prompt_entry(entry: dict[int, Logprob]) -> dict[str, dict[str, Any]]:
    return {str(token): _prompt_token(item) for token, item in entry.items()}


def _prompt_token(item: Logprob) -> dict[str, Any]:
    return {
        "logprob": item.logprob,
        "rank": item.rank,
        "decoded_token": item.decoded_token,
    }


def _top(entry: dict[int, Logprob], num_top: int) -> dict[str, float]:
    """The likeliest tokens, and the sampled one, which may not be among them.

    Tokens may share a text, such as parts of characters, which show as U+FFFD: those after the
    first are named by their ids.
    """
    ranked = sorted(entry, key=lambda token: -entry[token].logprob)[:num_top]
    named: dict[str, float] = {}
    for token in dict.fromkeys((*ranked, next(iter(entry)))):
        text = entry[token].decoded_token or ""
        named[f"token_id:{token}" if text in named else text] = entry[token].logprob
    return named


def _chat_token(item: Logprob, data: bytes) -> dict[str, Any]:
    return {"token": item.decoded_token or "", "logprob": item.logprob, "bytes": list(data)}
