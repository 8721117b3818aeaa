"""Request bodies of OpenAI's `/v1/responses`, as far as they are about text and functions."""

from __future__ import annotations

from typing import Any, ClassVar

from deployments.protocols.body import Body
from deployments.protocols.response_input import input_messages
from deployments.protocols.sampling import SamplingFields
from deployments.protocols.structured_outputs import with_form
from deployments.protocols.template import ReasoningEffort, TemplateFields
from deployments.protocols.tool_calls import ToolUse, read_tool_use
from engine.errors import InvalidRequest
from engine.sampling_params import SamplingParams
from engine.structured_outputs.params import StructuredOutputsParams

MAX_METADATA = 16
"""Most entries of `metadata`; this limit and the next two are OpenAI's."""
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512

_LOGPROBS = "message.output_text.logprobs"
"""What `include` calls the log-probabilities of an answer."""
_NAMES = {"max_tokens": "max_output_tokens", "logprobs": "top_logprobs", "messages": "input"}
"""What fields of chats are called here."""
_FUNCTION_FIELDS = ("name", "description", "parameters", "strict")


class TextOptions(Body):
    """`text`: the form of the answer."""

    format: dict[str, Any] | None = None
    """`{"type": "text"}`, `{"type": "json_object"}`, or `{"type": "json_schema", "name": ...,
    "schema": ...}`."""
    verbosity: str | None = None
    """Only `medium`."""


class ReasoningOptions(Body):
    """`reasoning`: how much to think. There are no summaries."""

    effort: ReasoningEffort | None = None
    """As `reasoning_effort`, which chats call it."""
    summary: None = None
    """Only null: what the model thought is told in full."""
    generate_summary: None = None
    """Likewise."""


class ResponsesBody(TemplateFields, SamplingFields):
    """Body of `/v1/responses`, with the sampling fields that vLLM adds to it."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "background": (False,),
        "prompt": (),
        "truncation": ("disabled",),
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
    tools: list[Any] | None = None
    """Functions that the model may call: `{"type": "function", "name", "description",
    "parameters"}`."""
    tool_choice: str | dict[str, Any] | None = None
    """`auto`, `none`, `required`, or `{"type": "function", "name": ...}`."""
    parallel_tool_calls: bool | None = None
    """Whether one answer may hold several calls; null means true."""
    include: list[Any] | None = None
    """With `message.output_text.logprobs` the answer's text has log-probabilities; other values
    are without effect."""
    top_logprobs: int | None = None
    """How many of the likeliest tokens they tell at each position."""
    reasoning: ReasoningOptions | None = None
    """How much to think."""
    metadata: dict[str, Any] | None = None
    """Comes back with the answer: up to 16 texts of up to 512 characters, by names of up to 64."""
    previous_response_id: str | None = None
    """Only null: nothing is kept."""
    conversation: Any = None
    """Only null."""
    store: bool | None = None
    """Accepted, and without effect: nothing is kept."""
    safety_identifier: str | None = None
    """Comes back with the answer, and has no other effect."""
    prompt_cache_key: str | None = None
    """Comes back with the answer, and has no other effect."""
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
        if self.max_tokens is not None:
            raise InvalidRequest("max_tokens is called max_output_tokens here.", "max_tokens")
        if self.max_output_tokens == 0:  # chats know a use for it, which there is none of here
            raise InvalidRequest(
                "max_output_tokens must be a positive integer, got 0.", "max_output_tokens"
            )
        if self.top_logprobs is not None and self.top_logprobs > 0 and not self.wants_logprobs:
            raise InvalidRequest(f"top_logprobs needs {_LOGPROBS} in include.", "top_logprobs")
        if self.text is not None and self.text.verbosity not in (None, "medium"):
            raise InvalidRequest("text: verbosity is not supported; leave it out.", "text")
        _check_metadata(self.metadata or {})

    def to_params(self) -> SamplingParams:
        """Sampling options; without a limit the answer may fill the model's context.

        Raises:
            InvalidRequest: a value is out of range; see `renamed`.
        """
        params = self.sampling_params(
            max_tokens=self.max_output_tokens,
            logprobs=(self.top_logprobs or 0) if self.wants_logprobs else None,
        )
        form = self._form()
        return params if form is None else with_form(params, form)

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer's text is to have log-probabilities."""
        return _LOGPROBS in (self.include or ())

    def tool_use(self) -> ToolUse | None:
        """What the model may call, or None when it may call nothing.

        Raises:
            InvalidRequest: the fields on tools are wrong.
        """
        tools = [_chat_tool(index, tool) for index, tool in enumerate(self.tools or ())]
        return read_tool_use(tools, _chat_choice(self.tool_choice), self.parallel_tool_calls)

    def effort(self) -> ReasoningEffort | None:
        """How much to think, by either name."""
        named = None if self.reasoning is None else self.reasoning.effort
        return self.reasoning_effort if named is None else named

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
        return found + input_messages(self.input)

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


def renamed(error: InvalidRequest) -> InvalidRequest:
    """An error of what this shares with chats, under the name that its field has here."""
    name = error.param or ""
    if (here := _NAMES.get(name)) is None:
        return error
    return InvalidRequest(error.message.replace(name, here), here)


def _chat_tool(index: int, tool: Any) -> dict[str, Any]:
    """A tool in the form that chats have for it."""
    if not isinstance(tool, dict) or tool.get("type") != "function" or "function" in tool:
        raise InvalidRequest(
            f'tools[{index}] must be of the form {{"type": "function", "name": "..."}}; this '
            "server has no tools of its own.",
            "tools",
        )
    function = {key: tool[key] for key in _FUNCTION_FIELDS if tool.get(key) is not None}
    return {"type": "function", "function": function}


def _chat_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    match choice:
        case None | "none" | "auto" | "required":
            return choice
        case {"type": "function", "name": str(name)}:
            return {"type": "function", "function": {"name": name}}
    raise InvalidRequest(
        'tool_choice must be "none", "auto", "required" or {"type": "function", "name": "..."}.',
        "tool_choice",
    )


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
