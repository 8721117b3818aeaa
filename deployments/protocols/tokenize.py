"""Bodies of `/tokenize` and `/detokenize`; field names follow vLLM."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import FailFast

from deployments.protocols.body import Body
from deployments.protocols.template import TemplateFields
from deployments.protocols.tool_calls import ToolUse, read_tool_use
from engine.errors import InvalidRequest


class TokenizeBody(TemplateFields):
    """Body of `/tokenize`: a prompt, or messages and how they become one."""

    model: str | None = None
    """May be left out when one model is served."""
    prompt: str | None = None
    """A text; give this or `messages`."""
    messages: Annotated[list[dict[str, Any]] | None, FailFast()] = None
    """A chat, which the model's template makes a prompt of."""
    add_special_tokens: bool | None = None
    """By default true for a prompt and false for messages, whose template writes them."""
    return_token_strs: bool | None = None
    """Whether to return the tokens as the vocabulary spells them, too."""

    def check(self) -> ToolUse | None:
        """What the template is told of tools.

        Raises:
            InvalidRequest: neither or both of prompt and messages are there, or tools are wrong.
        """
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("give either prompt or messages.", "prompt")
        return read_tool_use(self.tools, "auto", None)


class DetokenizeBody(Body):
    """Body of `/detokenize`."""

    model: str | None = None
    """May be left out when one model is served."""
    tokens: Annotated[list[int], FailFast()]
    """Their ids."""

    def check(self, vocab_size: int) -> None:
        """Look at the token ids.

        Raises:
            InvalidRequest: one is outside of the vocabulary.
        """
        if self.tokens and (min(self.tokens) < 0 or max(self.tokens) >= vocab_size):
            raise InvalidRequest(f"tokens must lie between 0 and {vocab_size - 1}.", "tokens")
