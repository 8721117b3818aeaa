"""Renders chat messages to a prompt with a model's Jinja template, as transformers does."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from engine.errors import InvalidRequest

_END_MARK = "\x02END OF THE FINAL MESSAGE "
"""Put behind the message to continue, to find where it ends; the space tells whether the template
trims. No text of a client holds a control character by chance."""


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja source.

    Raises:
        InvalidRequest: the source is not valid Jinja.
    """

    def __init__(self, source: str) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise InvalidRequest(
                f"chat_template is not valid Jinja ({error}).", "chat_template"
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any],
    ) -> str:
        """Render messages to a prompt.

        Args:
            messages: each with a `role` and usually a `content`: text, or text parts
                `{"type": "text", "text": …}`, which are joined by newlines.
            add_generation_prompt: end with the start of the assistant's turn.
            continue_final_message: end within the last message, so that the model goes on with it.
            variables: what else the template may use, such as `tools` and `bos_token`.

        Raises:
            InvalidRequest: the messages are malformed, or the template refuses them.
        """
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message excludes add_generation_prompt; set one of them to false.",
                "continue_final_message",
            )
        plain = [_plain(*each) for each in enumerate(messages)]
        if not plain:
            raise InvalidRequest("messages must hold at least one message.", "messages")
        if not continue_final_message:
            return self._render(plain, add_generation_prompt, variables)
        content = plain[-1].get("content")
        if not isinstance(content, str):
            raise InvalidRequest(
                "continue_final_message needs a last message with text content.", "messages"
            )
        plain[-1]["content"] = content + _END_MARK
        return _cut_at_mark(self._render(plain, False, variables))

    def _render(
        self, messages: list[dict[str, Any]], add_prompt: bool, variables: Mapping[str, Any]
    ) -> str:
        values = {**variables, "messages": messages, "add_generation_prompt": add_prompt}
        try:
            return self._template.render(values)
        except Exception as error:  # whatever the template's code runs into with this input
            raise InvalidRequest(
                f"the chat template does not accept these messages ({error!r}).", "messages"
            ) from error


def _plain(index: int, message: Any) -> dict[str, Any]:
    """A message whose content is text, or None beside calls of functions."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequest("each message must be an object with a 'role'.", "messages")
    content = message.get("content")
    if content is None and message["role"] != "assistant":
        raise InvalidRequest(f"messages[{index}] lacks its content.", "messages")
    if content is None and not message.get("tool_calls"):
        return {**message, "content": ""}
    if content is None or isinstance(content, str):
        return dict(message)
    if not isinstance(content, Sequence):
        raise InvalidRequest("content must be text or a list of text parts.", "messages")
    return {**message, "content": "\n".join(map(_part_text, content))}


def _part_text(part: Any) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise InvalidRequest(
            'content parts must be of the form {"type": "text", "text": "..."}; '
            "this model takes text only.",
            "messages",
        )
    return text


def _cut_at_mark(prompt: str) -> str:
    end = prompt.rfind(_END_MARK.strip(" "))
    if end < 0:
        raise InvalidRequest(
            "the chat template leaves out the last message, so continue_final_message cannot work.",
            "continue_final_message",
        )
    trims = not prompt.startswith(_END_MARK, end)
    return prompt[:end].rstrip() if trims else prompt[:end]


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The environment that published templates are written for; they are code from elsewhere."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationBlock(jinja2.ext.Extension):
    """Lets `{% generation %}` pass, which marks the assistant's words for training."""

    tags = {"generation"}  # noqa: RUF012 (declared so by the base class)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Replace the block by its body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes characters of HTML, which a prompt must not."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)
