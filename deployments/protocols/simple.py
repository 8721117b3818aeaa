"""Bodies of `/generate`, `/generate_stream` and `/batch_generate`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import FailFast

from deployments.protocols.sampling import SamplingFields
from engine.errors import InvalidRequest
from engine.sampling_params import SamplingParams

DEFAULT_TOKENS = 100
"""Default of `max_tokens` here."""


class SimpleFields(SamplingFields):
    """What the three have in common."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"logprobs": (), "prompt_logprobs": ()}

    model: str | None = None
    """May be left out when one model is served."""

    def to_params(self) -> SamplingParams:
        """Sampling options.

        Raises:
            InvalidRequest: a value is out of range.
        """
        max_tokens = DEFAULT_TOKENS if self.max_tokens is None else self.max_tokens
        return self.sampling_params(max_tokens=max_tokens)


class GenerateBody(SimpleFields):
    """Body of `/generate` and `/generate_stream`."""

    prompt: str


class BatchGenerateBody(SimpleFields):
    """Body of `/batch_generate`."""

    prompts: Annotated[list[str], FailFast()]

    def checked_prompts(self) -> list[str | list[int]]:
        """The prompts.

        Raises:
            InvalidRequest: there is none.
        """
        if not self.prompts:
            raise InvalidRequest("prompts must hold at least one prompt.", "prompts")
        return list(self.prompts)
