"""From messages to a prompt, and from text to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deployments.ingress.served import ServedModel, aside
from deployments.protocols.template import TemplateFields
from deployments.protocols.tool_calls import ToolUse, template_messages
from engine.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A chat as its template writes it."""

    text: str
    token_ids: list[int]


async def chat_prompt(
    model: ServedModel,
    fields: TemplateFields,
    messages: Sequence[dict[str, Any]],
    tool_use: ToolUse | None,
    body_length: int,
    *,
    remember: bool = True,
) -> ChatPrompt:
    """The prompt of a chat.

    Args:
        model: whose template to use.
        fields: how to.
        messages: of the chat.
        tool_use: the tools that the template is told of.
        body_length: of the request, in bytes.
        remember: whether another prompt with the same messages may take less time.

    Raises:
        InvalidRequest: the messages do not suit the template, or the prompt is too long.
    """
    tokenizer = model.need_tokenizer("messages")
    template = fields.chat_template or tokenizer.chat_template
    options = fields.template_variables()
    if fields.add_generation_prompt is not None or fields.continue_final_message:
        options["add_generation_prompt"] = bool(fields.add_generation_prompt)

    def write() -> ChatPrompt:
        text = tokenizer.apply_chat_template(
            template_messages(messages, template),
            chat_template=fields.chat_template,
            continue_final_message=fields.continue_final_message,
            tools=None if tool_use is None else tool_use.tools,
            **options,
        )
        model.check_length(text, "messages")  # a template may write more than it was given
        return ChatPrompt(text, tokenizer.encode_rendered(text, remember))

    return await aside(body_length, write)


async def chat_tokens(
    model: ServedModel, messages: Sequence[dict[str, Any]], param: str
) -> list[int]:
    """Token ids of a chat that `param` led to, as the model's own template writes it.

    Raises:
        InvalidRequest: see `chat_prompt`; names `param`.
    """
    length = sum(len(str(message.get("content"))) for message in messages)
    try:
        return (await chat_prompt(model, TemplateFields(), messages, None, length)).token_ids
    except InvalidRequest as error:  # the request has no field `messages`
        raise InvalidRequest(error.message, param) from None


async def tokenize(
    model: ServedModel, text: str, param: str, add_special_tokens: bool = True
) -> list[int]:
    """Token ids of a text that `param` led to."""
    tokenizer = model.need_tokenizer(param)
    return await aside(len(text), lambda: tokenizer.encode(text, add_special_tokens))
