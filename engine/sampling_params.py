"""What a caller may ask of sampling; field names and defaults follow vLLM."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import NamedTuple

import msgspec

from engine.errors import InvalidRequest
from engine.structured_outputs.params import StructuredOutputsParams

MAX_LOGPROBS = 20
"""Most alternatives a request may ask for at each position."""
MAX_STOP_STRINGS = 32
MAX_STOP_LENGTH = 1024
"""In characters; each token of the output is held against every stop string."""
MAX_NAMED_TOKENS = 1024
"""Most entries of `stop_token_ids`, `logit_bias` or `allowed_token_ids`, for which every row of a
batch has room."""
MAX_BAD_WORDS = 256
"""Most entries of `bad_words`; each may be spelled in two ways, for which every row has room."""
MAX_BAD_WORD_TOKENS = 16

MIN_TEMPERATURE = 1e-5
"""A lower temperature means greedy: logits divided by it could overflow float32."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Options of one request, validated when built.

    Raises:
        InvalidRequest: a value is out of range or of the wrong type; `param` names the field.
    """

    n: int = 1
    """Completions to generate for the prompt."""
    temperature: float = 1.0
    """Divides the logits; 0, or anything below 0.00001, means greedy."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probabilities sum to at least this."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 or -1 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest one."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the output already holds."""
    frequency_penalty: float = 0.0
    """Subtracted once for each time that the output already holds the token."""
    repetition_penalty: float = 1.0
    """Divides positive, multiplies negative logits of tokens in prompt or output."""
    logit_bias: dict[int, float] | None = None
    """Added to the logits of the given token ids."""
    allowed_token_ids: Sequence[int] | None = None
    """No other tokens, as long as the output's form, or `min_tokens`, leaves one of these."""
    bad_words: Sequence[str] = ()
    """Texts that the output does not hold, at its start or after a space: the last token of one is
    never sampled after the ones before it, while anything else is allowed."""
    bad_words_token_ids: Sequence[Sequence[int]] = ()
    """The spellings of `bad_words`, which whoever has the tokenizer fills in."""
    seed: int | None = None
    """Fixes the noise; None draws a fresh seed for each request."""
    max_tokens: int | None = 64
    """Most tokens to generate; None means until `max_model_len`, and 0, which `prompt_logprobs`
    permits, that the prompt is all that is asked about."""
    min_tokens: int = 0
    """No stop token before this many tokens."""
    stop: Sequence[str] = ()
    """Strings that end the output and are not part of it."""
    stop_token_ids: Sequence[int] = ()
    """Token ids that end the output, beside the model's own."""
    ignore_eos: bool = False
    """Go on past the model's end-of-sequence tokens."""
    include_stop_str_in_output: bool = False
    """Keep the stop string in the text."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    detokenize: bool = True
    """Make text of the output; false leaves its token ids, and finds no stop strings."""
    logprobs: int | None = None
    """Log-probabilities of the sampled token and of this many likeliest ones."""
    prompt_logprobs: int | None = None
    """Log-probabilities of each prompt token and of this many likeliest ones; such a prompt is
    always computed in full."""
    structured_outputs: StructuredOutputsParams | None = None
    """The form that the output must have."""

    def __post_init__(self) -> None:
        """Normalise `stop` to a tuple and check every field."""
        if isinstance(self.stop, str):
            msgspec.structs.force_setattr(self, "stop", (self.stop,))
        _check_numbers(self)
        _check_stops(self)
        _check_logit_bias(self.logit_bias)
        _check_allowed(self.allowed_token_ids)
        _check_bad_words(self)
        if not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            raise InvalidRequest(
                "structured_outputs must be StructuredOutputsParams.", "structured_outputs"
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken, the first one if several tie."""
        return self.temperature < MIN_TEMPERATURE or self.top_k == 1


class Range(NamedTuple):
    """What a number may be."""

    kind: type
    low: float
    high: float
    meaning: str
    """The same in words, to go on with after "must be"."""


RANGES: dict[str, Range] = {
    "n": Range(int, 1, 128, "an integer from 1 to 128"),
    "temperature": Range(float, 0.0, 100.0, "a number from 0 to 100"),
    "top_p": Range(float, 1e-9, 1.0, "a number above 0, up to 1"),
    "top_k": Range(int, -1, 2**31 - 1, "-1, 0 or a positive integer"),
    "min_p": Range(float, 0.0, 1.0, "a number from 0 to 1"),
    "presence_penalty": Range(float, -2.0, 2.0, "a number from -2 to 2"),
    "frequency_penalty": Range(float, -2.0, 2.0, "a number from -2 to 2"),
    "repetition_penalty": Range(float, 1e-6, 100.0, "a number above 0, up to 100"),
    "seed": Range(int, -(2**63), 2**63 - 1, "a 64-bit integer"),
    "max_tokens": Range(int, 0, 2**31 - 1, "a positive integer, or 0 with prompt_logprobs"),
    "min_tokens": Range(int, 0, 2**31 - 1, "0 or a positive integer"),
    "logprobs": Range(int, 0, MAX_LOGPROBS, f"an integer from 0 to {MAX_LOGPROBS}"),
    "prompt_logprobs": Range(int, 0, MAX_LOGPROBS, f"an integer from 0 to {MAX_LOGPROBS}"),
}
"""Of the fields that are numbers, by name."""
_OPTIONAL = {"seed", "max_tokens", "logprobs", "prompt_logprobs"}
_FLAGS = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "detokenize")


def _check_numbers(params: SamplingParams) -> None:
    for name, (kind, low, high, _) in RANGES.items():
        value = getattr(params, name)
        if value is None and name in _OPTIONAL:
            continue
        if not _is_number(value, kind) or not low <= value <= high:  # NaN fails the comparison
            raise _out_of_range(name, value)
    if params.max_tokens == 0 and params.prompt_logprobs is None:
        raise _out_of_range("max_tokens", 0)
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise InvalidRequest(
            f"min_tokens ({params.min_tokens}) must not exceed max_tokens ({params.max_tokens}).",
            "min_tokens",
        )
    for name in _FLAGS:
        if not isinstance(getattr(params, name), bool):
            raise InvalidRequest(f"{name} must be true or false.", name)


def _out_of_range(name: str, value: object) -> InvalidRequest:
    return InvalidRequest(f"{name} must be {RANGES[name].meaning}, got {value!r}.", name)


def _is_number(value: object, kind: type = float) -> bool:
    allowed = int if kind is int else (int, float)
    return isinstance(value, allowed) and not isinstance(value, bool)


def _check_stops(params: SamplingParams) -> None:
    texts, ids = params.stop, params.stop_token_ids
    if not isinstance(texts, (list, tuple)) or not all(isinstance(s, str) and s for s in texts):
        raise InvalidRequest("stop must be a non-empty string or a list of them.", "stop")
    if len(texts) > MAX_STOP_STRINGS or any(len(text) > MAX_STOP_LENGTH for text in texts):
        raise InvalidRequest(
            f"stop takes up to {MAX_STOP_STRINGS} strings of up to {MAX_STOP_LENGTH} characters.",
            "stop",
        )
    if texts and not params.detokenize:
        raise InvalidRequest("stop strings need detokenize to be true.", "stop")
    _check_token_ids("stop_token_ids", ids)


def _check_token_ids(name: str, ids: object) -> None:
    _check_count(name, ids)
    if not _are_token_ids(ids):
        raise InvalidRequest(f"{name} must be a list of token ids.", name)


def _are_token_ids(ids: object) -> bool:
    return isinstance(ids, (list, tuple)) and all(_is_number(i, int) and i >= 0 for i in ids)


def _check_allowed(ids: Sequence[int] | None) -> None:
    if ids is None:
        return
    _check_token_ids("allowed_token_ids", ids)
    if not ids:
        raise InvalidRequest(
            "allowed_token_ids must name at least one token; leave it out to allow all.",
            "allowed_token_ids",
        )


def check_spelling(ids: Sequence[int]) -> None:
    """Check how many tokens a spelling of one of `bad_words` has.

    Raises:
        InvalidRequest: none, or too many.
    """
    if not 0 < len(ids) <= MAX_BAD_WORD_TOKENS:
        raise InvalidRequest(
            f"bad_words takes texts of 1 to {MAX_BAD_WORD_TOKENS} tokens.", "bad_words"
        )


def _check_bad_words(params: SamplingParams) -> None:
    name, words = "bad_words", params.bad_words
    if not isinstance(words, (list, tuple)) or not all(isinstance(w, str) and w for w in words):
        raise InvalidRequest(f"{name} must be a list of texts, none of them empty.", name)
    if len(words) > MAX_BAD_WORDS or any(len(word) > MAX_STOP_LENGTH for word in words):
        raise InvalidRequest(
            f"{name} takes up to {MAX_BAD_WORDS} texts of up to {MAX_STOP_LENGTH} characters.",
            name,
        )
    spellings = params.bad_words_token_ids
    if not isinstance(spellings, (list, tuple)) or not all(map(_are_token_ids, spellings)):
        raise InvalidRequest(f"{name}_token_ids must be lists of token ids.", f"{name}_token_ids")
    for ids in spellings:
        check_spelling(ids)
    if len(spellings) > 2 * MAX_BAD_WORDS:
        raise InvalidRequest(
            f"{name}_token_ids takes up to {2 * MAX_BAD_WORDS} entries.", f"{name}_token_ids"
        )


def _check_logit_bias(bias: dict[int, float] | None) -> None:
    if bias is not None and not isinstance(bias, dict):
        raise InvalidRequest("logit_bias must map token ids to numbers.", "logit_bias")
    _check_count("logit_bias", bias)
    for token, value in (bias or {}).items():
        if not _is_number(token, int) or token < 0 or not _is_number(value):
            raise InvalidRequest("logit_bias must map token ids to numbers.", "logit_bias")
        if not -100 <= value <= 100:  # NaN fails the comparison
            raise InvalidRequest("logit_bias values must lie between -100 and 100.", "logit_bias")


def _check_count(name: str, entries: object) -> None:
    if isinstance(entries, Sized) and len(entries) > MAX_NAMED_TOKENS:
        raise InvalidRequest(f"{name} takes up to {MAX_NAMED_TOKENS} entries.", name)
