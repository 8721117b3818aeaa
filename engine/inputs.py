"""From what callers give to what the engine takes: prompt tokens, one request a completion."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, TypedDict

import msgspec

from engine.errors import InvalidRequest
from engine.sampling_params import SamplingParams, check_spelling
from engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from engine.request import EngineRequest
    from engine.runner.build import EngineInfo


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str


class TokensPrompt(TypedDict):
    """A prompt as token ids."""

    prompt_token_ids: Sequence[int]


Prompt = str | TextPrompt | TokensPrompt | Mapping[str, object]
"""What a caller may give as a prompt."""


def prompt_text(prompt: Prompt) -> str | None:
    """The text of a prompt, or None when it was given as token ids alone."""
    text = prompt if isinstance(prompt, str) else prompt.get("prompt")
    return text if isinstance(text, str) else None


def tokenize_prompt(
    prompt: Prompt,
    tokenizer: Tokenizer | None,
    max_model_len: int,
    vocab_size: int,
    has_output: bool = True,
) -> list[int]:
    """Turn a prompt into token ids and check that the model can take them.

    Args:
        prompt: a text, `{"prompt": …}` or `{"prompt_token_ids": […]}`.
        tokenizer: of the model; None when it has none, which leaves token ids only.
        max_model_len: most tokens of prompt and output together.
        vocab_size: of the model.
        has_output: whether tokens are to be generated.

    Raises:
        InvalidRequest: the prompt is empty, malformed, too long, or names an unknown token.
    """
    ids = _token_ids(prompt, tokenizer)
    if not ids:
        raise _invalid("the prompt must hold at least one token.")
    check_length(len(ids), max_model_len, has_output)
    if min(ids) < 0 or max(ids) >= vocab_size:
        bad = next(i for i in ids if not 0 <= i < vocab_size)
        raise _invalid(f"token id {bad} is outside of the vocabulary (0 to {vocab_size - 1}).")
    return ids


def check_length(num_tokens: int, max_model_len: int, has_output: bool) -> None:
    """Check that a prompt leaves room for the output, if there is to be any.

    Raises:
        InvalidRequest: it does not.
    """
    limit = max_model_len - has_output
    if num_tokens > limit:
        kept = ", of which at least 1 is for output" if has_output else ""
        raise _invalid(
            f"the prompt has {num_tokens} tokens, but max_model_len is {max_model_len}{kept}; "
            f"shorten the prompt to {limit} tokens or fewer."
        )


def check_token_options(params: SamplingParams, vocab_size: int) -> None:
    """Check that the options name tokens which the model has.

    Raises:
        InvalidRequest: an option names a token outside of the vocabulary, or `bad_words` leave
            none of `allowed_token_ids`.
    """
    allowed, spellings = params.allowed_token_ids or (), params.bad_words_token_ids
    named: dict[str, Iterable[int]] = {
        "stop_token_ids": params.stop_token_ids,
        "logit_bias": params.logit_bias or (),
        "allowed_token_ids": allowed,
        "bad_words": chain.from_iterable(spellings),
    }
    for name, ids in named.items():
        for token in ids:
            if token >= vocab_size:
                raise InvalidRequest(
                    f"{name} names token {token}, outside of the vocabulary "
                    f"(0 to {vocab_size - 1}).",
                    name,
                )
    if allowed and {ids[0] for ids in spellings if len(ids) == 1}.issuperset(allowed):
        raise InvalidRequest(
            "bad_words rule out all of allowed_token_ids; allow another token.", "bad_words"
        )


def check_request(wire: EngineRequest, info: EngineInfo) -> None:
    """Check, in the engine itself, that it can run a request, whoever sent it.

    Raises:
        InvalidRequest: it cannot.
    """
    if not wire.prompt_token_ids:
        raise _invalid("the prompt must hold at least one token.")
    check_length(len(wire.prompt_token_ids), info.max_model_len, wire.pooling is None)
    if wire.params.structured_outputs is not None and not info.eos_token_ids:
        raise InvalidRequest(
            "the model has no end-of-sequence token, which structured outputs need.",
            wire.params.structured_outputs.param,
        )
    _check_vocabulary(wire.prompt_token_ids, info.vocab_size, "prompt")
    _check_vocabulary(wire.params.stop_token_ids, info.vocab_size, "stop_token_ids")
    _check_vocabulary(wire.params.logit_bias or (), info.vocab_size, "logit_bias")


def _check_vocabulary(token_ids: Collection[int], vocab_size: int, param: str) -> None:
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        raise InvalidRequest(f"{param} holds a token id outside 0 to {vocab_size - 1}.", param)


def spell_bad_words(params: SamplingParams, tokenizer: Tokenizer | None) -> SamplingParams:
    """The same options with `bad_words_token_ids`: each word at the start of a text and within it.

    Options that have them already stay as they are, so that many prompts may share the work.

    Raises:
        InvalidRequest: there are bad words, and no tokenizer or too many tokens in one of them.
    """
    if not params.bad_words or params.bad_words_token_ids:
        return params
    if tokenizer is None:
        raise InvalidRequest("bad_words need a tokenizer, and the model has none.", "bad_words")
    spellings: dict[tuple[int, ...], None] = {}
    for word in params.bad_words:
        bare = word.lstrip() or word
        for text in (bare, f" {bare}"):
            ids = tuple(tokenizer.encode(text, add_special_tokens=False))
            check_spelling(ids)  # at once: all of many long texts would take most of a second
            spellings[ids] = None
    return msgspec.structs.replace(params, bad_words_token_ids=[*spellings])


def fan_out(
    params: SamplingParams, request_id: str, rng: random.Random | None = None
) -> list[tuple[str, SamplingParams]]:
    """One request for each of the `n` completions, with its seed.

    Only the first is asked for log-probabilities of the prompt, which are the same for all, unless
    all do nothing else.

    Args:
        params: as the caller gave them.
        request_id: kept for a single completion, else followed by `-0`, `-1`, ….
        rng: draws the seed when the caller gave none; None takes the system's entropy.

    Returns:
        (request id, options with `n` = 1 and a seed of its own: the caller's plus the completion's
        index, within 64 bits).
    """
    seed = params.seed
    if seed is None:
        seed = (rng or random.SystemRandom()).getrandbits(63)
    replace = msgspec.structs.replace
    if params.n == 1:
        return [(request_id, params if params.seed is not None else replace(params, seed=seed))]
    seeds = [_wrap_int64(seed + i) for i in range(params.n)]
    others = params if params.max_tokens == 0 else replace(params, prompt_logprobs=None)
    return [
        (f"{request_id}-{i}", replace(others if i else params, n=1, seed=each))
        for i, each in enumerate(seeds)
    ]


def _wrap_int64(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def _token_ids(prompt: Prompt, tokenizer: Tokenizer | None) -> list[int]:
    if isinstance(prompt, Mapping) and prompt.get("prompt_token_ids") is not None:
        return _checked_ids(prompt["prompt_token_ids"])
    text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
    if not isinstance(text, str):
        raise _invalid('a prompt must be a text, {"prompt": "..."} or {"prompt_token_ids": [...]}.')
    if not text:
        raise _invalid("the prompt must not be empty.")
    if tokenizer is None:
        raise _invalid("this model has no tokenizer; give the prompt as prompt_token_ids.")
    return tokenizer.encode(text)


def _checked_ids(ids: object) -> list[int]:
    if isinstance(ids, str | bytes) or not isinstance(ids, Sequence):
        raise _invalid("prompt_token_ids must be a list of token ids.")
    if not {int}.issuperset(map(type, ids)):
        raise _invalid("prompt_token_ids must hold integers only.")
    return list(ids)


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(message, "prompt")
