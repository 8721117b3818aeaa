"""The items that `/v1/responses` takes as input, as the messages of a chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.errors import InvalidRequest

_ROLES = frozenset(("user", "assistant", "system", "developer"))
_TEXT_PARTS = {
    "input_text": "text",
    "output_text": "text",
    "reasoning_text": "text",
    "text": "text",
    "refusal": "refusal",
}
"""Types of content parts, and which field holds their text."""


def input_messages(items: Sequence[Any]) -> list[dict[str, Any]]:
    """The messages that items stand for.

    An answer is one message in a chat, and several items here: what the model thought and the
    functions that it called go to the message that they came with.

    Raises:
        InvalidRequest: an item is malformed, or not about text or functions, or it is the output of
            a call that has not been made; `param` is `input`.
    """
    chat = _Chat()
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            raise InvalidRequest(f"input[{index}] must be an object.", "input")
        chat.add(f"input[{index}]", item)
    return chat.messages


class _Chat:
    """Messages as they grow by items."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._thought = ""
        """What the model thought before its next item."""
        self._call_ids: set[str] = set()

    def add(self, where: str, item: dict[str, Any]) -> None:
        """Take the item that stands at this place."""
        match item.get("type", "message"):
            case "reasoning":
                self._thought = _text(f"{where}.content", item.get("content") or "")
            case "message":
                self._append(_message(where, item))
            case "function_call":
                self._add_call(where, item)
            case "function_call_output":
                self._append(self._output(where, item))
            case _:
                raise InvalidRequest(
                    f"{where}: items must be of the type message, reasoning, function_call or "
                    "function_call_output; this server keeps no others.",
                    "input",
                )

    def _append(self, message: dict[str, Any]) -> None:
        if self._thought and message["role"] == "assistant":
            message["reasoning_content"] = self._thought
        self._thought = ""
        self.messages.append(message)

    def _add_call(self, where: str, item: dict[str, Any]) -> None:
        call_id, name, arguments = (item.get(key) for key in ("call_id", "name", "arguments"))
        if not (isinstance(call_id, str) and isinstance(name, str) and isinstance(arguments, str)):
            raise InvalidRequest(
                f"{where} must have texts as call_id, name and arguments, as the answer had that "
                "the call comes from.",
                "input",
            )
        if self._thought or not self.messages or self.messages[-1]["role"] != "assistant":
            self._append({"role": "assistant", "content": ""})
        function = {"name": name, "arguments": arguments}
        call = {"id": call_id, "type": "function", "function": function}
        self.messages[-1].setdefault("tool_calls", []).append(call)
        self._call_ids.add(call_id)

    def _output(self, where: str, item: dict[str, Any]) -> dict[str, Any]:
        call_id = item.get("call_id")
        if not isinstance(call_id, str) or call_id not in self._call_ids:
            raise InvalidRequest(
                f"{where}: call_id must be that of a function_call before it; send the answer's "
                "items as well.",
                "input",
            )
        content = _text(f"{where}.output", item.get("output"))
        return {"role": "tool", "tool_call_id": call_id, "content": content}


def _message(where: str, item: dict[str, Any]) -> dict[str, Any]:
    role = item.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise InvalidRequest(f"{where}: role must be one of {', '.join(sorted(_ROLES))}.", "input")
    return {"role": role, "content": _text(f"{where}.content", item.get("content"))}


def _text(where: str, content: Any) -> str:
    """The text of a content, whose parts are joined by newlines as in chats."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{where} must be text or a list of parts.", "input")
    return "\n".join(_part_text(f"{where}[{index}]", part) for index, part in enumerate(content))


def _part_text(where: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get(_TEXT_PARTS.get(kind, "")) if isinstance(kind, str) else None
    if not isinstance(text, str):
        raise InvalidRequest(
            f'{where} must be of the form {{"type": "input_text", "text": "..."}}; this server '
            "takes text only.",
            "input",
        )
    return text
