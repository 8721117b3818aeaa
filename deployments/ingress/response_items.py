"""The items of an answer of `/v1/responses`, and the events that tell how they grow."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

from deployments.ingress.message_style import MessageForm
from deployments.ingress.served import Piece
from deployments.protocols.message_events import (
    CallArguments,
    CallBegin,
    CallBroken,
    Event,
    Reasoning,
    Text,
)
from engine.job import Job
from engine.outputs import FinishReason, Logprob

Told = tuple[str, dict[str, Any]]
"""The type of an event and its fields."""
LogprobsReader = Callable[[list[dict[int, Logprob]]], list[dict[str, Any]]]
"""From the engine's form to OpenAI's."""


def new_id(prefix: str) -> str:
    """OpenAI's ids of answers and their items have underscores; some clients look at the prefix."""
    return f"{prefix}_{uuid.uuid4().hex}"


class TextItem:
    """A message, or what the model thought.

    Args:
        kind: of the events that it is made of.
        place: among the items.
    """

    def __init__(self, kind: type[Text] | type[Reasoning], place: int) -> None:
        self.kind = kind
        self._place = place
        self._part: dict[str, Any]
        self.value: dict[str, Any]
        if kind is Reasoning:
            self._part = {"type": "reasoning_text", "text": ""}
            self.value = {"type": "reasoning", "id": new_id("rs"), "summary": []}
        else:
            self._part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self.value = {"type": "message", "id": new_id("msg"), "role": "assistant"}
        self.value |= {"status": "in_progress", "content": []}

    def begin(self) -> Iterator[Told]:
        """The events before the first text."""
        yield "response.output_item.added", {"output_index": self._place, "item": self.value}
        self.value["content"] = [self._part]
        yield "response.content_part.added", self._fields(part=self._part)

    def add(self, text: str, logprobs: list[dict[str, Any]]) -> Iterator[Told]:
        """More text, and the log-probabilities of its tokens."""
        self._part["text"] += text
        yield self._event("delta", logprobs, delta=text)
        if logprobs:
            self._part["logprobs"] += logprobs

    def end(self, status: str) -> Iterator[Told]:
        """The events after the last text."""
        self.value["status"] = status
        yield self._event("done", self._part.get("logprobs", []), text=self._part["text"])
        yield "response.content_part.done", self._fields(part=self._part)
        yield "response.output_item.done", {"output_index": self._place, "item": self.value}

    def _event(self, what: str, logprobs: list[dict[str, Any]], **fields: str) -> Told:
        told = self._fields(**fields)
        if self.kind is Text:
            told["logprobs"] = [_without_bytes(entry) for entry in logprobs]
        return f"response.{self._part['type']}.{what}", told

    def _fields(self, **fields: Any) -> dict[str, Any]:
        place = {"output_index": self._place, "content_index": 0}
        return {"item_id": self.value["id"], **place, **fields}


class CallItem:
    """A call of a function.

    Args:
        name: of the function.
        place: among the items.
    """

    def __init__(self, name: str, place: int) -> None:
        self._place = place
        self.value: dict[str, Any] = {
            "type": "function_call",
            "id": new_id("fc"),
            "call_id": new_id("call"),
            "name": name,
            "arguments": "",
            "status": "in_progress",
        }

    def begin(self) -> Iterator[Told]:
        """The event before the arguments."""
        yield "response.output_item.added", {"output_index": self._place, "item": self.value}

    def add(self, text: str) -> Iterator[Told]:
        """More of the arguments."""
        self.value["arguments"] += text
        yield "response.function_call_arguments.delta", self._fields(delta=text)

    def end(self, status: str) -> Iterator[Told]:
        """The events after the arguments."""
        self.value["status"] = status
        done = self._fields(arguments=self.value["arguments"])
        yield "response.function_call_arguments.done", done
        yield "response.output_item.done", {"output_index": self._place, "item": self.value}

    def _fields(self, **fields: str) -> dict[str, Any]:
        return {"item_id": self.value["id"], "output_index": self._place, **fields}


class Output:
    """The items of an answer as it grows: thinking, messages and calls, in the model's order.

    Args:
        form: how to read its text.
        read_logprobs: reads those of its text.
        is_streamed: whether clients are told of items as they grow. Then a call that turns out to
            be none stays, as an incomplete one; else its text goes to the message.
    """

    def __init__(self, form: MessageForm, read_logprobs: LogprobsReader, is_streamed: bool) -> None:
        self.finish_reason: FinishReason | None = None
        self.num_reasoning_tokens = 0
        """Of the output's tokens, to within those that came with the thinking's last one."""
        self._parser = form.parser()
        self._parallel = form.parallel
        self._read_logprobs = read_logprobs
        self._is_streamed = is_streamed
        self._items: list[TextItem | CallItem] = []
        self._open: TextItem | CallItem | None = None
        """The last item, unless it has ended."""
        self._num_calls = 0
        self._logprobs: list[dict[str, Any]] = []
        """Of tokens whose text has not come yet."""

    @property
    def items(self) -> list[dict[str, Any]]:
        """As OpenAI has them."""
        return [item.value for item in self._items]

    @property
    def status(self) -> str:
        """Of the answer, as OpenAI calls it."""
        if self.finish_reason is None:
            return "in_progress"
        return "incomplete" if self.finish_reason == "length" else "completed"

    def push(self, piece: Piece) -> Iterator[Told]:
        """Take in a piece, and tell the events that it makes."""
        reason = piece.delta.finish_reason
        if piece.delta.logprobs:
            self._logprobs += self._read_logprobs(piece.delta.logprobs)
        for event in self._parser.push(piece.delta.text, reason is not None):
            if isinstance(event, Reasoning):
                self.num_reasoning_tokens = _num_tokens(piece.job)
            yield from self._tell(event)
        if reason is not None:
            self.finish_reason = reason
            if not self._items or self._logprobs:
                yield from self._add_text(Text(""))
            # A call that is there is whole, whatever would have followed it.
            is_call = isinstance(self._open, CallItem)
            yield from self._end("completed" if is_call else self.status)

    def _tell(self, event: Event) -> Iterator[Told]:
        match event:
            case Text() | Reasoning():
                yield from self._add_text(event)
            case CallBegin(name):
                self._num_calls += 1
                if self._takes_call:
                    yield from self._begin(CallItem(name, len(self._items)))
            case CallArguments(text):
                if self._takes_call and isinstance(self._open, CallItem):
                    yield from self._open.add(text)
            case CallBroken(source):
                if self._takes_call:
                    yield from self._break(source)
                else:  # nothing has been told of it
                    yield from self._add_text(Text(source))
                self._num_calls -= 1

    @property
    def _takes_call(self) -> bool:
        return self._parallel or self._num_calls == 1

    def _add_text(self, event: Text | Reasoning) -> Iterator[Told]:
        item = self._open
        if not isinstance(item, TextItem) or item.kind is not type(event):
            item = TextItem(type(event), len(self._items))
            yield from self._begin(item)
        if event.text or self._logprobs:
            logprobs, self._logprobs = self._logprobs, []
            yield from item.add(event.text, logprobs)

    def _break(self, source: str) -> Iterator[Told]:
        """The open call is none."""
        if self._is_streamed:
            yield from self._end("incomplete")
            return
        self._items.pop()
        last = self._items[-1] if self._items else None
        self._open = last if isinstance(last, TextItem) and last.kind is Text else None
        yield from self._add_text(Text(source))

    def _begin(self, item: TextItem | CallItem) -> Iterator[Told]:
        yield from self._end("completed")
        self._items.append(item)
        self._open = item
        yield from item.begin()

    def _end(self, status: str) -> Iterator[Told]:
        item, self._open = self._open, None
        if item is not None:
            yield from item.end(status)


def _without_bytes(entry: dict[str, Any]) -> dict[str, Any]:
    """Log-probabilities as events have them."""
    top = [{"token": t["token"], "logprob": t["logprob"]} for t in entry["top_logprobs"]]
    return {"token": entry["token"], "logprob": entry["logprob"], "top_logprobs": top}


def _num_tokens(job: Job) -> int:
    return sum(len(processor.token_ids) for processor in job.processors.values())
