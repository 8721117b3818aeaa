"""The fields that say how a chat becomes a prompt."""

from __future__ import annotations

from typing import Any, Literal

from deployments.protocols.body import Body
from engine.errors import InvalidRequest

_NOT_VARIABLES = frozenset(
    (
        "self",
        "messages",
        "tools",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
    )
)
"""Names of `chat_template_kwargs` that mean something else than a variable of the template."""

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
"""OpenAI's, and `max`, which vLLM adds."""


class TemplateFields(Body):
    """What chats and their tokenization have in common."""

    tools: list[Any] | None = None
    """Functions that the model may call: `{"type": "function", "function": {"name", "description",
    "parameters"}}`."""
    add_generation_prompt: bool | None = None
    """Whether the prompt ends with the start of the assistant's turn; None means unless a
    message is continued."""
    continue_final_message: bool = False
    """Whether the answer goes on with the last message rather than following it."""
    chat_template: str | None = None
    """Jinja source in place of the model's own, where the server allows it."""
    chat_template_kwargs: dict[str, Any] | None = None
    """More variables of the template, such as `enable_thinking`."""
    documents: list[Any] | None = None
    """Texts to answer from, for templates that know them."""
    reasoning_effort: ReasoningEffort | None = None
    """How much to think, for templates that know this variable or `enable_thinking`, which `none`
    makes false and anything else true."""

    def template_variables(self) -> dict[str, Any]:
        """What else the template is told; the client's own variables come first."""
        told: dict[str, Any] = {}
        if self.documents is not None:
            told["documents"] = self.documents
        if (effort := self.effort()) is not None:
            told["reasoning_effort"] = effort
            told["enable_thinking"] = effort != "none"
        return told | (self.chat_template_kwargs or {})

    def effort(self) -> ReasoningEffort | None:
        """How much to think."""
        return self.reasoning_effort

    def check_template_options(self, allow_template: bool) -> None:
        """Refuse a template of the client's own, and variables of names that are taken.

        Args:
            allow_template: whether clients may send templates. A template is a program, which can
                run for as long as it likes.

        Raises:
            InvalidRequest: see above.
        """
        if self.chat_template is not None and not allow_template:
            raise InvalidRequest(
                "chat_template is not accepted by this server; leave it out.", "chat_template"
            )
        if taken := sorted(_NOT_VARIABLES.intersection(self.chat_template_kwargs or ())):
            raise InvalidRequest(
                f"chat_template_kwargs must not name {', '.join(taken)}; use the request's own "
                "fields.",
                "chat_template_kwargs",
            )
