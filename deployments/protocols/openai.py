"""Request bodies of OpenAI's API, with vLLM's additional fields."""

from __future__ import annotations

from itertools import chain
from typing import Annotated, Any, ClassVar

from pydantic import FailFast, PlainValidator

from deployments.protocols.body import Body
from deployments.protocols.sampling import NOTHING, SamplingFields
from deployments.protocols.template import TemplateFields
from deployments.protocols.tool_calls import ToolUse, read_tool_use
from engine.errors import InvalidRequest
from engine.sampling_params import SamplingParams

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of `max_tokens` for `/v1/completions`."""


class StreamOptions(Body):
    """`stream_options`."""

    include_usage: bool | None = None
    """Whether a last chunk, without choices, tells the numbers of tokens."""
    continuous_usage_stats: bool | None = None
    """Whether every chunk tells them."""


class GenerationBody(SamplingFields):
    """What completions and chat have in common."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"truncation_side": ("left",)}

    model: str
    """Name of a served model."""
    stream: bool | None = None
    """Whether the answer comes in pieces, as server-sent events."""
    stream_options: StreamOptions | None = None
    """What a stream tells besides; only with `stream`."""
    cache_salt: str | None = None
    """Prompts share cached prefixes only with those of the same salt."""
    return_token_ids: bool | None = None
    """Whether the answer has the ids of the tokens of prompt and output."""
    return_tokens_as_token_ids: bool | None = None
    """Whether log-probabilities name tokens as `token_id:5`, as tokens may share a text."""
    truncate_prompt_tokens: int | None = None
    """So many tokens are kept of a prompt, its last ones; -1 keeps what leaves room for the
    output."""

    def num_kept(self, max_model_len: int, params: SamplingParams) -> int | None:
        """How many tokens are kept of a prompt, or None for all.

        Raises:
            InvalidRequest: `truncate_prompt_tokens` is out of range.
        """
        kept = self.truncate_prompt_tokens
        if kept == -1:
            return max(1, max_model_len - (params.max_tokens or 1))
        if kept is not None and not 0 < kept < max_model_len:
            raise InvalidRequest(
                f"truncate_prompt_tokens must be -1, or from 1 to {max_model_len - 1}.",
                "truncate_prompt_tokens",
            )
        return kept

    def output_limit(self) -> tuple[str, int | None]:
        """The field that limits the output, and its value."""
        return "max_tokens", self.max_tokens

    def check_stream_options(self) -> None:
        """Refuse options that do not go with whether a stream was asked for.

        Raises:
            InvalidRequest: `stream_options` without `stream`, or `prompt_logprobs` with it.
        """
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidRequest(
                "prompt_logprobs is not supported with stream; leave one of them out.",
                "prompt_logprobs",
            )
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options needs stream to be true.", "stream_options")


PromptField = str | list[str] | list[int] | list[list[int]]
"""One text, one list of token ids, or a list of either."""


def _check_prompt(value: Any) -> PromptField:
    """Find out which of the four it is, by one look at each element."""
    items = value if isinstance(value, list) else [value]
    kinds = set(map(type, items))
    if kinds == {list}:
        kinds = {list, *map(type, chain.from_iterable(items))}
    if isinstance(value, str) or (
        isinstance(value, list) and kinds in ({str}, {int}, {list}, {list, int}, set())
    ):
        return value
    raise ValueError("must be a text, token ids, a list of texts, or a list of lists of token ids")


Prompts = Annotated[PromptField, PlainValidator(_check_prompt, json_schema_input_type=PromptField)]
"""A field of a body."""


def list_prompts(prompts: PromptField, param: str) -> list[str | list[int]]:
    """The prompts of a field, one or many.

    Args:
        prompts: value of the field.
        param: its name.

    Raises:
        InvalidRequest: there is none.
    """
    if not prompts:
        raise InvalidRequest(f"{param} must not be empty.", param)
    if isinstance(prompts, str):
        return [prompts]
    ids = [item for item in prompts if isinstance(item, int)]
    if ids:
        return [ids]
    return [item for item in prompts if not isinstance(item, int)]


class CompletionBody(GenerationBody):
    """Body of `/v1/completions`."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "suffix": NOTHING,
        "prompt_embeds": NOTHING,
    }

    prompt: Prompts
    """One text, one list of token ids, or a list of either; each is answered `n` times."""
    logprobs: int | None = None
    """Log-probabilities of each token of the text and of this many likeliest ones, 0 to 20."""
    echo: bool | None = None
    """Whether the text begins with the prompt; `max_tokens` may then be 0."""
    add_special_tokens: bool = True
    """Whether the tokens that the model wants around a text, such as a first one, are put there."""

    def to_params(self) -> SamplingParams:
        """Sampling options.

        Raises:
            InvalidRequest: a value is out of range.
        """
        max_tokens = DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        return self.sampling_params(
            max_tokens=max_tokens, logprobs=self.logprobs, prompt_logprobs=self._num_scored()
        )

    def _num_scored(self) -> int | None:
        """Alternatives wanted at each position of the prompt, or None if it is not scored."""
        wanted = [self.prompt_logprobs]
        if self.echo:
            wanted += [self.logprobs, 0 if self.max_tokens == 0 else None]
        return max((count for count in wanted if count is not None), default=None)

    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or many.

        Raises:
            InvalidRequest: there is none.
        """
        return list_prompts(self.prompt, "prompt")


class ChatBody(TemplateFields, GenerationBody):
    """Body of `/v1/chat/completions`."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "functions": NOTHING,
        "function_call": ("none", "auto"),
        "audio": (),
        "modalities": (["text"],),
        "prediction": (),
        "moderation": (),
        "verbosity": ("medium",),
        "web_search_options": (),
        "return_prompt_text": NOTHING,
        "echo": NOTHING,
        "add_special_tokens": NOTHING,
    }

    messages: Annotated[list[dict[str, Any]], FailFast()]
    """The chat so far. Roles are `system`, `developer`, `user`, `assistant` and `tool`; a content
    is a text, or a list of parts of text."""
    max_completion_tokens: int | None = None
    """The same as `max_tokens`; give one."""
    logprobs: bool | None = None
    """Whether the answer has the log-probability of each token."""
    top_logprobs: int | None = None
    """And of this many likeliest ones, 0 to 20; only with `logprobs`."""
    tool_choice: str | dict[str, Any] | None = None
    """`"none"`, `"auto"`, `"required"`, or `{"type": "function", "function": {"name": ...}}`. None
    means auto."""
    parallel_tool_calls: bool | None = None
    """False for one call at most in an answer; None means true."""
    include_reasoning: bool | None = None
    """False leaves out what the model thinks, for models with a `reasoning_parser`; None
    means true."""

    def to_params(self) -> SamplingParams:
        """Sampling options; without a limit the answer may fill the model's context.

        Raises:
            InvalidRequest: a value is out of range.
        """
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise InvalidRequest(
                "max_tokens and max_completion_tokens mean the same; give one.", "max_tokens"
            )
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true.", "top_logprobs")
        try:
            return self.sampling_params(
                max_tokens=self.output_limit()[1],
                logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            )
        except InvalidRequest as error:
            raise self._renamed(error) from None

    def output_limit(self) -> tuple[str, int | None]:
        """The field that limits the output, and its value."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return super().output_limit()

    def tool_use(self) -> ToolUse | None:
        """What the model may call, or None when it may call nothing.

        Raises:
            InvalidRequest: the fields on tools are wrong.
        """
        return read_tool_use(self.tools, self.tool_choice, self.parallel_tool_calls)

    def _renamed(self, error: InvalidRequest) -> InvalidRequest:
        """The same error under the name that the client used."""
        names = {"logprobs": "top_logprobs", "max_tokens": self.output_limit()[0]}
        used = names.get(error.param or "")
        if used is None:
            return error
        return InvalidRequest(error.message.replace(str(error.param), used), used)
