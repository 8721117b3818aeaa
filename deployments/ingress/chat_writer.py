"""Writes the chunks of streamed chats."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deployments.ingress.answers import Chunks
from deployments.ingress.message_style import MessageForm
from deployments.ingress.messages import MessageDeltas
from deployments.ingress.served import Piece, ServedModel
from deployments.protocols.logprobs import chat_logprobs
from deployments.protocols.openai import ChatBody
from engine.outputs import Logprob


def choice_logprobs(
    model: ServedModel, body: ChatBody, entries: list[dict[int, Logprob]]
) -> Iterator[dict[str, Any]]:
    """OpenAI's `logprobs.content` of a choice."""
    token_bytes = model.need_tokenizer("logprobs").token_bytes(skip_special_tokens=False)
    by_id = bool(body.return_tokens_as_token_ids)
    return chat_logprobs(entries, body.top_logprobs or 0, token_bytes, by_id)


class ChatWriter:
    """Writes the chunks of one answer."""

    def __init__(self, model: ServedModel, body: ChatBody, chunks: Chunks) -> None:
        self._chunks = chunks
        self._model = model
        self._body = body
        self._begun: set[int] = set()

    def write(self, piece: Piece) -> bytes:
        """The chunk of a piece, after one with the role if it is the first of its choice."""
        delta, index = piece.delta, piece.choice
        role = b"" if index in self._begun else self._role(index)
        if not delta.text and delta.finish_reason is None and not delta.logprobs:
            return role
        logprobs = self._logprobs(piece)
        message = {"content": delta.text} if delta.text else {}
        chunk = self._chunk(index, message, logprobs, delta.finish_reason, delta.stop_reason)
        return role + chunk

    def _role(self, index: int) -> bytes:
        """The chunk that a choice begins with."""
        self._begun.add(index)
        return self._chunk(index, {"role": self._model.style.role, "content": ""})

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not piece.delta.logprobs:
            return None
        return {"content": list(choice_logprobs(self._model, self._body, piece.delta.logprobs))}

    def _chunk(
        self,
        index: int,
        message: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
        stop_reason: int | str | None = None,
    ) -> bytes:
        choice: dict[str, Any] = {
            "index": index,
            "delta": message,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        if stop_reason is not None:
            choice["stop_reason"] = stop_reason
        return self._chunks.chunk(choice)


class MessageWriter(ChatWriter):
    """Writes the chunks of an answer that may hold more than content."""

    def __init__(
        self, model: ServedModel, body: ChatBody, chunks: Chunks, form: MessageForm
    ) -> None:
        super().__init__(model, body, chunks)
        self._form = form
        self._messages: dict[int, MessageDeltas] = {}

    def write(self, piece: Piece) -> bytes:
        """The chunks of a piece: one for each delta, the last one with how the choice ended."""
        delta, index = piece.delta, piece.choice
        role = b"" if index in self._begun else self._role(index)
        message = self._messages.setdefault(index, MessageDeltas(self._form))
        ended = delta.finish_reason is not None
        changes = message.push(delta.text, ended)
        logprobs = self._logprobs(piece)
        if not changes and (ended or logprobs):
            changes = [{}]
        data, last = [role], len(changes) - 1
        for place, change in enumerate(changes):
            at_end = ended and place == last
            reason = message.finish_reason(delta.finish_reason) if at_end else None
            stop = delta.stop_reason if at_end else None
            data.append(self._chunk(index, change, logprobs, reason, stop))
            logprobs = None  # with the first one only
        return b"".join(data)
