"""Request bodies of OpenAI's `/v1/responses`, as far as they are about text."""

from __future__ import annotations

from typing import Any, ClassVar

from deployments.protocols.body import Body
from deployments.protocols.sampling import SamplingFields
from deployments.protocols.structured_outputs import with_form
from deployments.protocols.template import TemplateFields
from engine.errors import InvalidRequest
from engine.sampling_params import SamplingParams
from engine.structured_outputs.params import StructuredOutputsParams

MAX_METADATA = 16
"""Most entries of `metadata`; this limit and the next two are OpenAI's."""
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512

_ROLES = frozenset(("user", "assistant", "system", "developer"))
_TEXT_PARTS = {
    "input_text": "text",
    "output_text": "text",
    "reasoning_text": "text",
    "text": "text",
    "refusal": "refusal",
}
"""Types of content parts, and which field holds their text."""


class TextOptions(Body):
    """`text`: the form of the answer."""

    format: dict[str, Any] | None = None
    """`{"type": "text"}`, `{"type": "json_object"}`, or `{"type": "json_schema", "name": ...,
    "schema": ...}`."""
    verbosity: str | None = None
    """Only `medium`."""


class ResponsesBody(TemplateFields, SamplingFields):
    """Body of `/v1/responses`, with the sampling fields that vLLM adds to it."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "background": (False,),
        "prompt": (),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "truncation": ("disabled",),
        "top_logprobs": (0,),
        "context_management": ([],),
        "moderation": (),
        "n": (1,),
        "prompt_logprobs": (),
        "enable_response_messages": (False,),
        "previous_input_messages": ([],),
        "previous_response": (),
        "vllm_xargs": ({},),
    }

    model: str
    """Name of a served model."""
    input: str | list[Any]
    """What the user says, or the items of the chat so far: messages and earlier answers."""
    instructions: str | None = None
    """A system message that goes before them."""
    max_output_tokens: int | None = None
    """Most tokens to generate; None means until `max_model_len`."""
    stream: bool | None = None
    """Whether the answer comes as server-sent events."""
    text: TextOptions | None = None
    """The form of the answer."""
    include: list[Any] | None = None
    """Accepted, and without effect."""
    reasoning: dict[str, Any] | None = None
    """Only with null values."""
    metadata: dict[str, Any] | None = None
    """Comes back with the answer: up to 16 texts of up to 512 characters, by names of up to 64."""
    previous_response_id: str | None = None
    """Only null: nothing is kept."""
    conversation: Any = None
    """Only null."""
    store: bool | None = None
    """Accepted, and without effect: nothing is kept."""
    tool_choice: str | None = None
    """Only `none` and `auto`, as there are no tools."""
    parallel_tool_calls: bool | None = None
    """Comes back with the answer, and has no other effect."""
    safety_identifier: str | None = None
    """Comes back with the answer, and has no other effect."""
    prompt_cache_key: str | None = None
    """Likewise."""
    cache_salt: str | None = None
    """Prompts share cached prefixes only with those of the same salt."""

    def check(self) -> None:
        """Refuse what would need answers of the past, or an answer of another kind.

        Raises:
            InvalidRequest: see above.
        """
        for name in ("previous_response_id", "conversation"):
            if getattr(self, name) is not None:
                raise InvalidRequest(
                    f"{name} is not supported: this server keeps no answers; send the items "
                    "before in input.",
                    name,
                )
        if "message.output_text.logprobs" in (self.include or ()):
            raise InvalidRequest(
                "include: message.output_text.logprobs is not supported; leave it out.", "include"
            )
        if any(value is not None for value in (self.reasoning or {}).values()):
            raise InvalidRequest("reasoning is not supported; leave it out.", "reasoning")
        if self.text is not None and self.text.verbosity not in (None, "medium"):
            raise InvalidRequest("text: verbosity is not supported; leave it out.", "text")
        _check_metadata(self.metadata or {})

    def to_params(self) -> SamplingParams:
        """Sampling options; without a limit the answer may fill the model's context.

        Raises:
            InvalidRequest: a value is out of range.
        """
        if self.max_tokens is not None:
            raise InvalidRequest("max_tokens is called max_output_tokens here.", "max_tokens")
        try:
            params = self.sampling_params(max_tokens=self.max_output_tokens)
        except InvalidRequest as error:
            if error.param != "max_tokens":
                raise
            message = error.message.replace("max_tokens", "max_output_tokens")
            raise InvalidRequest(message, "max_output_tokens") from None
        form = self._form()
        return params if form is None else with_form(params, form)

    def text_format(self) -> dict[str, Any]:
        """`text.format`, or OpenAI's default."""
        return (self.text.format if self.text is not None else None) or {"type": "text"}

    def messages(self) -> list[dict[str, Any]]:
        """The input as the messages of a chat.

        Raises:
            InvalidRequest: an item is malformed, or not about text.
        """
        found: list[dict[str, Any]] = []
        if self.instructions:
            found.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*found, {"role": "user", "content": self.input}]
        thought = ""
        for index, item in enumerate(self.input):
            where = f"input[{index}]"
            if not isinstance(item, dict):
                raise InvalidRequest(f"{where} must be an object.", "input")
            if item.get("type") == "reasoning":
                thought = _text(f"{where}.content", item.get("content") or "")
                continue
            message = _message(where, item)
            if thought and message["role"] == "assistant":
                message["reasoning_content"] = thought
            thought = ""
            found.append(message)
        return found

    def _form(self) -> StructuredOutputsParams | None:
        match self.text_format():
            case {"type": "text"}:
                return None
            case {"type": "json_object"}:
                return StructuredOutputsParams(json_object=True, param="text")
            case {"type": "json_schema", "name": str(), "schema": dict(schema)}:
                return StructuredOutputsParams(json=schema, param="text")
        raise InvalidRequest(
            'text: format must be {"type": "text"}, {"type": "json_object"} or '
            '{"type": "json_schema", "name": "...", "schema": {...}}.',
            "text",
        )


def _message(where: str, item: dict[str, Any]) -> dict[str, Any]:
    kind, role = item.get("type", "message"), item.get("role")
    if kind != "message":
        raise InvalidRequest(
            f"{where}: items must be of the type message or reasoning; this server answers to "
            "text only.",
            "input",
        )
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


def _check_metadata(metadata: dict[str, Any]) -> None:
    fits = len(metadata) <= MAX_METADATA and all(
        len(key) <= MAX_METADATA_KEY and isinstance(value, str) and len(value) <= MAX_METADATA_VALUE
        for key, value in metadata.items()
    )
    if not fits:
        raise InvalidRequest(
            f"metadata must map up to {MAX_METADATA} texts of up to {MAX_METADATA_KEY} characters "
            f"to texts of up to {MAX_METADATA_VALUE}.",
            "metadata",
        )
