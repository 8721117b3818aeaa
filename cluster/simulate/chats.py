"""Chats and their requests, whose tokens have no content but names for their blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from cluster.simulate.ingress import Ingress


class Turn(NamedTuple):
    """What a user does next."""

    pause_s: float
    """Before, since the last answer or the chat's beginning."""
    said: int
    """Tokens, without what was said before."""
    answered: int
    """Tokens asked of the engine."""


class Chat:
    """Turns over one text that grows.

    Args:
        key: names the text; no other chat has it.
        turns: at least one.
        prefix: names the text's beginning, which chats with the same name share.
        prefix_tokens: length of that.
    """

    __slots__ = ("_key", "_names", "_prefix", "_prefix_tokens", "history", "num_done", "turns")

    def __init__(
        self, key: bytes, turns: Sequence[Turn], prefix: bytes = b"", prefix_tokens: int = 0
    ) -> None:
        self._key = key
        self._prefix = prefix
        self._prefix_tokens = prefix_tokens
        self._names: dict[int, list[bytes]] = {}
        self.turns = turns
        self.num_done = 0
        self.history = prefix_tokens
        """Tokens so far."""

    def blocks(self, block_size: int, num_tokens: int) -> list[bytes]:
        """Names of the full blocks of the text's first tokens.

        Two are equal where a hash over the tokens and all before them would be.
        """
        names = self._names.setdefault(block_size, [])
        wanted = num_tokens // block_size
        for index in range(len(names), wanted):
            shared = (index + 1) * block_size <= self._prefix_tokens
            names.append((self._prefix if shared else self._key) + index.to_bytes(4, "big"))
        return names[:wanted]


@dataclass(slots=True, eq=False)
class Request:
    """One turn on its way through the fleet."""

    request_id: str
    chat: Chat
    num_prompt: int
    """Tokens, of what was said before too."""
    num_output: int
    ingress: Ingress
    sent_at: float
    submitted_at: float = 0.0
    """When it reached its engine."""
    eligible: int = 0
    """First step of its engine that it may be in."""
    num_cached: int = 0
    """Prompt tokens that were in the engine's cache."""
    num_missing: int = 0
    """Prompt tokens that are still to be computed."""
    held: list[bytes] | None = None
    """Named blocks that it has a reference to."""
    num_unnamed: int = 0
    """Other blocks that it has."""

    @property
    def num_tokens(self) -> int:
        """Prompt and output."""
        return self.num_prompt + self.num_output
