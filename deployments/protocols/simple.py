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
    """What to go on with, or with the next three fields, what the user says last."""
    stream: bool | None = None
    """Whether `/generate` streams, as `/generate_stream` always does."""
    system_info: str | None = None
    """What the model is told before the chat."""
    history_input: Annotated[list[str] | None, FailFast()] = None
    """What the user has said so far, oldest first."""
    history_output: Annotated[list[str] | None, FailFast()] = None
    """What the model has answered to each."""

    def messages(self) -> list[dict[str, Any]] | None:
        """The chat that the prompt is the end of; None for a prompt that stands for itself.

        Raises:
            InvalidRequest: there are not as many answers as inputs.
        """
        inputs, outputs = self.history_input or [], self.history_output or []
        if not (self.system_info or inputs or outputs):
            return None
        if len(inputs) != len(outputs):
            raise InvalidRequest(
                f"history_output must answer each of the {len(inputs)} texts of history_input, "
                f"but has {len(outputs)}.",
                "history_output",
            )
        system = [("system", self.system_info)] if self.system_info else []
        turns = [
            turn
            for said, answered in zip(inputs, outputs, strict=True)
            for turn in (("user", said), ("assistant", answered))
        ]
        chat = [*system, *turns, ("user", self.prompt)]
        return [{"role": role, "content": content} for role, content in chat]


class BatchGenerateBody(SimpleFields):
    """Body of `/batch_generate`."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **SimpleFields.unsupported,
        "stream": (False,),
    }

    prompts: Annotated[list[str], FailFast()]
    """Each is answered on its own."""

    def checked_prompts(self) -> list[str | list[int]]:
        """The prompts.

        Raises:
            InvalidRequest: there is none.
        """
        if not self.prompts:
            raise InvalidRequest("prompts must hold at least one prompt.", "prompts")
        return list(self.prompts)
