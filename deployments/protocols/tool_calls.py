"""What a chat request says of tools, and earlier calls in the form that chat templates expect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from engine.errors import InvalidRequest
from engine.structured_outputs.json_schema import rebase
from engine.structured_outputs.params import MAX_GRAMMAR_LENGTH

MAX_NAME_LENGTH = 256
"""In characters. (OpenAI takes 64.)"""

ROLES = ("developer", "system", "user", "assistant", "tool", "function")
"""OpenAI's."""

_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
_SAYS_WHAT = frozenset(("type", "$ref", "anyOf", "oneOf", "allOf"))
"""Keywords with which a schema says what kind of value it is for."""


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools that a model may or must use."""

    tools: list[dict[str, Any]]
    """As the client gave them, for the chat template."""
    choice: Literal["auto", "required", "named"] = "auto"
    """Whether the model may call a function, must call some, or must call the one of `tools`."""
    parallel: bool = True
    """Whether one answer may hold several calls."""

    @property
    def names(self) -> frozenset[str]:
        """Of the functions."""
        return frozenset(tool["function"]["name"] for tool in self.tools)

    @property
    def is_forced(self) -> bool:
        """Whether the answer must be calls, and so is written as `schema` has it."""
        return self.choice != "auto"

    def schema(self) -> dict[str, Any]:
        """JSON schema of a list of calls, which `ListedCallsParser` reads."""
        places = [f"#/$defs/{number}" for number in range(len(self.tools))]
        parameters = [_parameters(tool["function"]) for tool in self.tools]
        text = msgspec.json.encode(parameters)
        if b'"$ref"' in text and len(text) <= MAX_GRAMMAR_LENGTH:  # else it will be refused
            parameters = list(map(rebase, parameters, places))
        calls = [
            _call_schema(tool["function"]["name"], place)
            for tool, place in zip(self.tools, places, strict=True)
        ]
        schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
        if self.choice == "named" or not self.parallel:
            schema["maxItems"] = 1
        return schema | {"$defs": {str(i): each for i, each in enumerate(parameters)}}


def read_tool_use(
    tools: list[Any] | None, choice: str | dict[str, Any] | None, parallel: bool | None
) -> ToolUse | None:
    """Check `tools`, `tool_choice` and `parallel_tool_calls`.

    Returns:
        What the model may call, or None when it may call nothing; then it is told of no tools.

    Raises:
        InvalidRequest: one of them is wrong; `param` names it.
    """
    for index, tool in enumerate(tools or ()):
        _check_tool(index, tool)
    kind, name = _read_choice(choice)
    if not tools:
        if kind in ("required", "named"):
            raise InvalidRequest("tool_choice needs tools; give some.", "tool_choice")
        return None
    if kind == "none":
        return None
    if kind == "named":
        tools = [tool for tool in tools if tool["function"]["name"] == name][:1]
        if not tools:
            raise InvalidRequest(
                f"tool_choice names '{name[:200]}', which is not among the tools.", "tool_choice"
            )
    return ToolUse(tools, kind, parallel is not False)


def _check_tool(index: int, tool: Any) -> None:
    where = f"tools[{index}]"
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or tool.get("type") != "function":
        raise InvalidRequest(
            f'{where} must be of the form {{"type": "function", "function": {{"name": "..."}}}}.',
            "tools",
        )
    name = function.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_LENGTH:
        raise InvalidRequest(
            f"{where} needs a name: a text of up to {MAX_NAME_LENGTH} characters.", "tools"
        )
    for key, kind, meaning in (
        ("description", str, "a text"),
        ("parameters", dict, "a JSON schema"),
        ("strict", bool, "true or false"),
    ):
        if not isinstance(function.get(key), kind | None):
            raise InvalidRequest(f"{where}: {key} must be {meaning}.", "tools")


def _read_choice(
    choice: str | dict[str, Any] | None,
) -> tuple[Literal["none", "auto", "required", "named"], str]:
    """What is to be done, and the name of the function if one is named."""
    match choice:
        case None | "auto":
            return "auto", ""
        case "none":
            return "none", ""
        case "required":
            return "required", ""
        case {"type": "function", "function": {"name": str(name)}}:
            return "named", name
    raise InvalidRequest(
        'tool_choice must be "none", "auto", "required" or '
        '{"type": "function", "function": {"name": "..."}}.',
        "tool_choice",
    )


def _parameters(function: dict[str, Any]) -> dict[str, Any]:
    """Schema of the arguments of a call."""
    schema = function.get("parameters") or _NO_PARAMETERS
    return {**schema, "type": "object"} if _SAYS_WHAT.isdisjoint(schema) else schema


def _call_schema(name: str, parameters: str) -> dict[str, Any]:
    """Schema of a call of a function; `parameters` points to that of its arguments."""
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": {"$ref": parameters}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def template_messages(
    messages: Sequence[dict[str, Any]], template: str | None
) -> list[dict[str, Any]]:
    """Messages as chat templates expect them, which is not quite OpenAI's form.

    Templates are written for `transformers`, where the arguments of calls are objects, not texts,
    and assistant messages always have a content. Qwen3's looks for `reasoning_content`, which
    newer clients call `reasoning`. And few know the role `developer`, OpenAI's for `system`.

    Args:
        messages: of the chat.
        template: that they are for.

    Raises:
        InvalidRequest: a role is neither one of `ROLES` nor named by the template, or the calls in
            a message are malformed.
    """
    for index, message in enumerate(messages):
        _check_role(index, message.get("role"), template or "")
    role = "developer" if "developer" in (template or "") else "system"
    return [_for_template(message, role) for message in messages]


def _check_role(index: int, role: Any, template: str) -> None:
    """Refuse a role that most templates would write as it is, and no model has ever seen."""
    if not isinstance(role, str) or role in ROLES:
        return
    if f"'{role}'" in template or f'"{role}"' in template:
        return
    where = f"messages[{index}].role"
    raise InvalidRequest(f"{where} must be one of {', '.join(ROLES)}.", where)


def _for_template(message: dict[str, Any], developer: str) -> dict[str, Any]:
    role = message.get("role")
    if role == "assistant":
        return _of_assistant(message)
    return {**message, "role": developer} if role == "developer" else message


def _of_assistant(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    changed = {key: value for key, value in message.items() if key != "tool_calls"}
    if changed.get("content") is None:
        changed["content"] = ""
    thought = message.get("reasoning_content") or message.get("reasoning")
    if isinstance(thought, str):
        changed |= {"reasoning_content": thought, "reasoning": thought}
    if calls:
        if not isinstance(calls, list):
            raise _bad_call()
        changed["tool_calls"] = [_call(call) for call in calls]
    return changed


def _call(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise _bad_call()
    return {**call, "function": {**function, "arguments": _arguments(function.get("arguments"))}}


def _arguments(given: Any) -> Any:
    """An object, or what is given when it is no object: a model may have broken off in it."""
    if given is None or given == "":
        return {}
    if not isinstance(given, str):
        return given
    try:
        value = json.loads(given)
    except (ValueError, RecursionError):
        return given
    return value if isinstance(value, dict) else given


def _bad_call() -> InvalidRequest:
    return InvalidRequest(
        'tool_calls in messages must be of the form [{"id": "...", "type": "function", '
        '"function": {"name": "...", "arguments": "{...}"}}].',
        "messages",
    )
