"""The fields that say how a chat becomes a prompt."""

from __future__ import annotations

from typing import Any

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


class TemplateFields(Body):
    """What chats and their tokenization have in common."""

    tools: list[Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

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
