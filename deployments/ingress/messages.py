"""Chat answers that hold more than content: calls of functions, and what the model thought."""

from __future__ import annotations

import uuid
from typing import Any, Literal

from deployments.ingress.message_style import MessageForm
from deployments.protocols.message_events import (
    CallArguments,
    CallBegin,
    CallBroken,
    Event,
    Reasoning,
    Text,
)
from engine.outputs import CompletionOutput, FinishReason


def whole_message(form: MessageForm, output: CompletionOutput) -> tuple[dict[str, Any], str | None]:
    """The message of a completion that has ended, but its role, and OpenAI's `finish_reason`."""
    content, thought = [], []
    calls: list[dict[str, Any]] = []
    for event in form.parser().push(output.text, True):
        match event:
            case Text(text):
                content.append(text)
            case Reasoning(text):
                thought.append(text)
            case CallBegin(name):
                calls.append(_new_call(name))
            case CallArguments(text):
                calls[-1]["function"]["arguments"] += text
            case CallBroken(source):
                calls.pop()
                content.append(source)
    if not form.parallel:
        del calls[1:]
    text = "".join(content)
    message: dict[str, Any] = {"content": text or None}
    if thought and form.tells_reasoning:
        message |= _reasoning("".join(thought))
    if calls:
        message["tool_calls"] = calls
    elif not thought:
        message["content"] = text
    return message, _finish_reason(form, output.finish_reason, bool(calls))


class MessageDeltas:
    """Writes one completion as the deltas of a stream."""

    def __init__(self, form: MessageForm) -> None:
        self._form = form
        self._parser = form.parser()
        self._num_calls = 0
        """Without those that turned out to be none."""
        self._num_told = 0
        """With them: what has been sent of one cannot be taken back."""

    def push(self, text: str, ended: bool) -> list[dict[str, Any]]:
        """The deltas that the next piece of the text makes; with the last one, what is left."""
        deltas = (self._delta(event) for event in self._parser.push(text, ended))
        return [delta for delta in deltas if delta is not None]

    def finish_reason(self, reason: FinishReason | None) -> str | None:
        """OpenAI's `finish_reason` of the completion so far."""
        return _finish_reason(self._form, reason, self._num_calls > 0)

    def _delta(self, event: Event) -> dict[str, Any] | None:
        match event:
            case Text(text):
                return {"content": text}
            case Reasoning(text):
                return _reasoning(text) if self._form.tells_reasoning else None
            case CallBegin(name):
                self._num_calls += 1
                if not self._takes_call:
                    return None
                self._num_told += 1
                return self._change(_new_call(name))
            case CallArguments(text):
                return self._change({"function": {"arguments": text}}) if self._takes_call else None
            case CallBroken(source):
                was_told = self._takes_call
                self._num_calls -= 1
                return None if was_told else {"content": source}

    @property
    def _takes_call(self) -> bool:
        """Whether the call that began last is told."""
        return self._form.parallel or self._num_calls == 1

    def _change(self, change: dict[str, Any]) -> dict[str, Any]:
        return {"tool_calls": [{"index": self._num_told - 1, **change}]}


def _new_call(name: str) -> dict[str, Any]:
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": name, "arguments": ""},
    }


def _reasoning(text: str) -> dict[str, Any]:
    """DeepSeek's name, which most clients look for, and vLLM's newer one."""
    return {"reasoning_content": text, "reasoning": text}


def _finish_reason(
    form: MessageForm, reason: FinishReason | None, has_calls: bool
) -> FinishReason | Literal["tool_calls"] | None:
    """`stop` where the client named the function: OpenAI's way to say who decided."""
    decided = has_calls and reason == "stop" and not form.is_named
    return "tool_calls" if decided else reason
