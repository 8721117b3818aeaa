"""The sampling fields that OpenAI's API and vLLM's additions share among endpoints."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar

from pydantic import Field

from deployments.protocols.structured_outputs import FormFields
from engine.errors import InvalidRequest
from engine.sampling_params import SamplingParams

_COPIED = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "allowed_token_ids",
    "bad_words",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "prompt_logprobs",
)

_MAX_DIGITS = 20
"""Of a token id; `int` refuses thousands of them."""
NOTHING: tuple[Any, ...] = (False, [], {}, "")
"""Values by which clients ask for nothing."""


class SamplingFields(FormFields):
    """Null means the default; ranges, and the elements of lists and mappings, are checked by
    `SamplingParams`."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "best_of": (1,),
        "use_beam_search": NOTHING,
        "length_penalty": (1,),
        "guided_whitespace_pattern": (),
        "structural_tag": (),
        "logits_processors": NOTHING,
        "logprob_token_ids": NOTHING,
        "repetition_detection": NOTHING,
        "thinking_token_budget": (-1,),
        "vllm_xargs": NOTHING,
        "kv_transfer_params": NOTHING,
        "ec_transfer_params": NOTHING,
        "watermarking": NOTHING,
    }

    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | list[Any] | None = None
    stop_token_ids: list[Any] | None = None
    allowed_token_ids: list[Any] | None = None
    bad_words: list[Any] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    priority: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    """Lower goes first, under the scheduling policy `priority`."""
    user: str | None = None
    """Accepted, and without effect."""

    def sampling_params(self, **more: Any) -> SamplingParams:
        """The engine's form of the fields; `more` overrides.

        Raises:
            InvalidRequest: a value is out of range.
        """
        given = {
            name: value for name in _COPIED if (value := getattr(self, name)) is not None
        } | more
        if self.logit_bias:
            given["logit_bias"] = _by_token(self.logit_bias)
        if form := self.asked_form():
            given["structured_outputs"] = form
        return SamplingParams(**given)


def check_room(
    prompt_lengths: Iterable[int], max_model_len: int, limit: tuple[str, int | None]
) -> None:
    """Refuse a limit of the output for which a prompt leaves no room.

    Chats of OpenAI and of vLLM do so too.

    Args:
        prompt_lengths: in tokens.
        max_model_len: of the model.
        limit: name of the field and its value; without one the output may fill what there is.

    Raises:
        InvalidRequest: see above; names the field.
    """
    name, asked = limit
    longest = max(prompt_lengths)
    if asked is not None and longest + asked > max_model_len:
        raise InvalidRequest(
            f"{name} is {asked}, but max_model_len is {max_model_len} and the prompt has {longest} "
            f"tokens, which leaves {max_model_len - longest}; ask for fewer, or leave {name} out.",
            name,
        )


def _by_token(bias: dict[str, Any]) -> dict[int, Any]:
    for token in bias:
        if not (token.isascii() and token.isdecimal() and len(token) <= _MAX_DIGITS):
            raise InvalidRequest(
                "logit_bias must map token ids, written as strings, to numbers, and "
                f"{token[:50]!r} is no token id.",
                "logit_bias",
            )
    return {int(token): value for token, value in bias.items()}
