"""Log-probabilities in the two forms that OpenAI's API has for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from engine.outputs import Logprob


def chat_logprobs(
    entries: Iterable[dict[int, Logprob]],
    num_top: int,
    token_bytes: Mapping[int, bytes],
    by_id: bool = False,
) -> Iterator[dict[str, Any]]:
    """The entries of chat completions; the sampled token comes first in each of those given.

    `bytes` are the token's own, taken from `token_bytes`: clients join them where a character
    spans tokens, whose texts show it as U+FFFD. `by_id` names tokens by their ids.
    """
    for entry in entries:
        tokens = [
            _chat_token(token_name(token, item.decoded_token, by_id), item, token_bytes[token])
            for token, item in entry.items()
        ]
        ranked = sorted(tokens, key=lambda token: -token["logprob"])
        yield {**tokens[0], "top_logprobs": ranked[:num_top]}


def token_name(token_id: int, text: str | None, by_id: bool) -> str:
    """What a token is called: its text, if it has one or, to be told apart, `token_id:5`."""
    return f"token_id:{token_id}" if by_id or text is None else text


def completion_logprobs(
    entries: Sequence[dict[int, Logprob]], num_top: int, offsets: list[int], by_id: bool = False
) -> dict[str, Any]:
    """The form of text completions; the sampled token comes first in each entry.

    Args:
        entries: one for each token.
        num_top: alternatives that were asked for.
        offsets: where each token begins in the text.
        by_id: name tokens by their ids.
    """
    sampled = [next(iter(entry.items())) for entry in entries]
    return {
        "tokens": [token_name(token, item.decoded_token, by_id) for token, item in sampled],
        "token_logprobs": [item.logprob for _, item in sampled],
        "top_logprobs": [_top(entry, num_top, by_id) for entry in entries] if num_top else None,
        "text_offset": offsets,
    }


def joined_logprobs(
    before: dict[str, Any] | None, after: dict[str, Any] | None
) -> dict[str, Any] | None:
    """The log-probabilities of two parts of a text, in the form of text completions."""
    if before is None or after is None:
        return before or after
    return {name: values and values + after[name] for name, values in before.items()}


def prompt_logprobs(
    entries: list[dict[int, Logprob] | None] | None, num_top: int
) -> Iterator[dict[str, dict[str, Any]] | None] | None:
    """vLLM's form: for each prompt position, token id → its log-probability, rank and text.

    Args:
        entries: one for each token of the prompt, which comes first in it; None for the first one.
        num_top: alternatives that were asked for; there may be more in the entries.
    """
    if entries is None:
        return None
    return (_prompt_entry(entry, num_top) if entry else None for entry in entries)


def _prompt_entry(entry: dict[int, Logprob], num_top: int) -> dict[str, dict[str, Any]]:
    first = next(iter(entry))
    return {
        str(token): _prompt_token(item)
        for token, item in entry.items()
        if token == first or (item.rank or 0) <= num_top
    }


def _prompt_token(item: Logprob) -> dict[str, Any]:
    return {
        "logprob": item.logprob,
        "rank": item.rank,
        "decoded_token": item.decoded_token,
    }


def _top(entry: dict[int, Logprob], num_top: int, by_id: bool) -> dict[str, float]:
    """The likeliest tokens, and the sampled one, which may not be among them.

    Tokens may share a text, such as parts of characters, which show as U+FFFD: those after the
    first are named by their ids.
    """
    ranked = sorted(entry, key=lambda token: -entry[token].logprob)[:num_top]
    named: dict[str, float] = {}
    for token in dict.fromkeys((*ranked, next(iter(entry)))):
        text = entry[token].decoded_token
        named[token_name(token, text, by_id or text in named)] = entry[token].logprob
    return named


def _chat_token(name: str, item: Logprob, data: bytes) -> dict[str, Any]:
    return {"token": name, "logprob": item.logprob, "bytes": list(data)}
