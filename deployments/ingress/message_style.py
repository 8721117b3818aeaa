"""How a model writes its messages: what of their text is thinking, and what are calls."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from deployments.protocols.message_events import Event, Text
from deployments.protocols.reasoning import (
    CLOSING,
    OPENING,
    REASONING_PARSERS,
    ReasoningParser,
)
from deployments.protocols.structured_outputs import with_form
from deployments.protocols.tool_calls import ToolUse
from deployments.protocols.tool_parsers import TOOL_CALL_PARSERS, guess_parser
from deployments.protocols.tool_parsers.base import ToolCallParser
from deployments.protocols.tool_parsers.listed import ListedCallsParser
from engine.sampling_params import SamplingParams
from engine.structured_outputs.params import StructuredOutputsParams
from engine.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class MessageStyle:
    """Of one model."""

    calls: type[ToolCallParser] | None = None
    reasoning: type[ReasoningParser] | None = None
    special_texts: frozenset[str] = frozenset()
    """Texts of the special tokens, which answers normally leave out."""
    role: str = "assistant"
    """Of the messages that it writes."""

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer | None,
        tool_call_parser: str | None = None,
        reasoning_parser: str | None = None,
        role: str = "assistant",
    ) -> MessageStyle:
        """By the names of parsers; without one for calls, it is guessed from the chat template."""
        if tokenizer is None:
            return cls(role=role)
        calls = tool_call_parser or guess_parser(tokenizer.chat_template)
        return cls(
            TOOL_CALL_PARSERS[calls] if calls else None,
            REASONING_PARSERS[reasoning_parser] if reasoning_parser else None,
            frozenset(map(tokenizer.token_text, tokenizer.special_ids)),
            role,
        )

    def form(
        self,
        tool_use: ToolUse | None,
        thinking: bool | None,
        may_think: bool = True,
        tells_reasoning: bool = True,
    ) -> MessageForm | None:
        """How to read the answer to a request; None when its text is the message.

        Args:
            tool_use: what the request says of tools.
            thinking: what the prompt says of thinking, see `thinking_in_prompt`.
            may_think: whether the answer has room for it.
            tells_reasoning: whether the message says what the model thought.
        """
        calls = self.calls if tool_use is not None else None
        if tool_use is not None and tool_use.is_forced:
            calls = ListedCallsParser
        reasoning = self.reasoning if may_think else None
        if calls is None and reasoning is None:
            return None
        return MessageForm(calls, tool_use, reasoning, thinking, tells_reasoning)

    def params(self, asked: SamplingParams, tool_use: ToolUse | None) -> SamplingParams:
        """The sampling options of a request, with what reading its answer needs.

        Raises:
            InvalidRequest: the answer must be calls, and the request asks for another form as well.
        """
        if tool_use is not None and tool_use.is_forced:
            schema = tool_use.schema()
            form = StructuredOutputsParams(json=schema, disable_any_whitespace=True, param="tools")
            return with_form(asked, form)
        if self._hides_marks(tool_use):
            return msgspec.structs.replace(asked, skip_special_tokens=False)
        return asked

    def _hides_marks(self, tool_use: ToolUse | None) -> bool:
        """Whether special tokens must stay in the text, as some of them are what is looked for."""
        marks = {OPENING, CLOSING} if self.reasoning is not None else set()
        if tool_use is not None and self.calls is not None:
            marks |= {self.calls.opening, self.calls.closing}
        return not marks.isdisjoint(self.special_texts)


@dataclass(frozen=True, slots=True)
class MessageForm:
    """How to read the answer to one request; the fields are as in `MessageStyle`."""

    calls: type[ToolCallParser] | None
    tool_use: ToolUse | None
    reasoning: type[ReasoningParser] | None
    thinking: bool | None
    tells_reasoning: bool = True

    @property
    def is_named(self) -> bool:
        """Whether the client has named the function to call, so that the model decided nothing."""
        return self.tool_use is not None and self.tool_use.choice == "named"

    @property
    def parallel(self) -> bool:
        """Whether a message may hold several calls; if not, those after the first are left out."""
        return self.tool_use is None or self.tool_use.parallel

    def parser(self) -> MessageParser:
        """Reads one completion."""
        names = frozenset() if self.tool_use is None else self.tool_use.names
        return MessageParser(
            None if self.calls is None else self.calls(names),
            None if self.reasoning is None else self.reasoning(self.thinking),
        )


class MessageParser:
    """Reads the text of one completion: first thinking, then content and calls."""

    def __init__(self, calls: ToolCallParser | None, reasoning: ReasoningParser | None) -> None:
        self._calls = calls
        self._reasoning = reasoning

    def push(self, text: str, ended: bool) -> list[Event]:
        """What the next piece of the text tells, and with the last one, what is left to tell."""
        events: list[Event] = [Text(text)] if text else []
        if self._reasoning is not None:
            events = self._reasoning.push(text) + (self._reasoning.finish() if ended else [])
        if self._calls is None:
            return events
        found: list[Event] = []
        for event in events:
            found += self._calls.push(event.text) if isinstance(event, Text) else [event]
        return found + (self._calls.finish() if ended else [])
