"""Splits what a model thinks, between `<think>` and `</think>`, from what it answers."""

from __future__ import annotations

from typing import ClassVar

from deployments.protocols.json_scan import WHITESPACE
from deployments.protocols.marks import overlap
from deployments.protocols.message_events import Event, Reasoning, Text

OPENING, CLOSING = "<think>", "</think>"


def thinking_at_end(text: str) -> bool | None:
    """Whether a text, such as an answer to go on with, ends within the thinking or behind it.

    None where it says nothing about it.
    """
    opened, closed = text.rfind(OPENING), text.rfind(CLOSING)
    return None if opened == closed else opened > closed


def thinking_in_prompt(prompt: str) -> bool | None:
    """The same of a prompt that ends with the start of the assistant's turn.

    Only its very end counts: the messages before may speak of the marks.
    """
    end = prompt.rstrip()
    return True if end.endswith(OPENING) else False if end.endswith(CLOSING) else None


class ReasoningParser:
    """Base of the parsers.

    The events depend on the text alone, not on how it was divided.

    Args:
        thinking: what the prompt says of it, see `thinking_in_prompt`.
    """

    implicit: ClassVar[bool]
    """Whether a model that was not told to think, and does not say that it does, thinks."""

    def __init__(self, thinking: bool | None = None) -> None:
        self._implicit = self.implicit if thinking is None else thinking
        self._begun = thinking is False
        """Whether anything but whitespace has come, or is not waited for."""
        self._thinking = False
        self._held = ""
        """The end of the text so far, where a mark might begin."""

    def push(self, text: str) -> list[Event]:
        """What the next piece of the text tells."""
        text, self._held = self._held + text, ""
        if not self._begun:
            text = self._read_start(text)
        if not self._thinking:
            return [Text(text)] if text else []
        thought, mark, answer = text.partition(CLOSING)
        if mark:
            self._thinking = False
            return [*_reasoning(thought), *([Text(answer)] if answer else [])]
        end = len(text) - overlap(text, CLOSING)
        self._held = text[end:]
        return _reasoning(text[:end])

    def finish(self) -> list[Event]:
        """What is left to tell when no more will come."""
        held, self._held = self._held, ""
        if self._thinking or (not self._begun and self._implicit):
            return _reasoning(held)
        return [Text(held)] if held else []

    def _read_start(self, text: str) -> str:
        """The text behind the opening mark, which may be missing; nothing while it may come."""
        start = text.lstrip(WHITESPACE)
        if OPENING.startswith(start) and start != OPENING:
            self._held = text
            return ""
        self._begun = True
        marked = start.startswith(OPENING)
        self._thinking = marked or self._implicit
        return start.removeprefix(OPENING) if marked else text


def _reasoning(text: str) -> list[Event]:
    return [Reasoning(text)] if text else []


class Qwen3Parser(ReasoningParser):
    """Qwen3: says when it thinks, where the prompt does not say it."""

    implicit = False


class DeepSeekR1Parser(ReasoningParser):
    """DeepSeek-R1 and its distillations: think first, though they may not say so."""

    implicit = True


REASONING_PARSERS: dict[str, type[ReasoningParser]] = {
    "qwen3": Qwen3Parser,
    "deepseek_r1": DeepSeekR1Parser,
}
"""By the names that vLLM's `--reasoning-parser` has for them."""
