"""How much stands before a new request, and when that is too much."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, exp, inf
from typing import NamedTuple

from engine.outputs import EngineLoad

LATELY_S = 5.0
"""Time that a queue lasted counts for exp(-t / `LATELY_S`) when it was t seconds ago."""
KNOWN_AFTER_S = 1.0
"""A queue that has lasted less says nothing yet of its speed."""
LONGEST_RETRY_S = 60
"""No client is told to stay away for longer."""


class Backlog(NamedTuple):
    """What waits before a new request on the engine that would come to it first."""

    tokens: float = 0.0
    """Prompt tokens to compute before its own."""
    wait_s: float = 0.0
    """How long they are likely to take, by Little's law; 0 where no queue has been seen yet."""


@dataclass(frozen=True, slots=True)
class BacklogLimits:
    """Beyond these a request is refused; None sets no limit."""

    max_tokens: int | None = None
    max_wait_s: float | None = None

    @property
    def are_set(self) -> bool:
        """Whether there is any."""
        return self.max_tokens is not None or self.max_wait_s is not None

    def retry_after_s(self, backlog: Backlog) -> int | None:
        """Seconds after which another try makes sense, at least 1; None if it may be taken now."""
        if self.max_wait_s is not None and backlog.wait_s > self.max_wait_s:
            return max(1, ceil(min(backlog.wait_s - self.max_wait_s, LONGEST_RETRY_S)))
        if self.max_tokens is not None and backlog.tokens > self.max_tokens:
            return 1
        return None


class QueueSpeed:
    """Prompt tokens a second that an engine gets done while others wait.

    It says what a queue waits for, whether that is prefill, or blocks and rows that are taken.
    """

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    def follow(self, before: EngineLoad, after: EngineLoad, elapsed: float) -> None:
        """Take over two reports of the engine, one after the other, `elapsed` seconds apart."""
        fading = exp(-elapsed / LATELY_S)
        self._tokens *= fading
        self._seconds *= fading
        if before.waiting_tokens:
            # Prompts computed anew after a preemption count as well: they wait in the queue again,
            # so that its length over this is the time that all of it takes. Else an engine that
            # only recomputes for a while would seem to stand still.
            self._tokens += max(0, after.prefilled_tokens - before.prefilled_tokens)
            self._seconds += elapsed

    def seconds_for(self, tokens: float) -> float:
        """How long so many tokens are likely to take; 0 while nothing is known."""
        if not tokens or self._seconds < KNOWN_AFTER_S:
            return 0.0
        return tokens * self._seconds / self._tokens if self._tokens else inf
