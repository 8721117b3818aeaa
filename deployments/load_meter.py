"""What an engine tells the autoscaler: how full it is, what comes in, and how long that waits."""

from __future__ import annotations

from collections import deque
from math import ceil, exp
from typing import NamedTuple

from engine.outputs import EngineLoad

LATELY_S = 3.0
"""What arrived t seconds ago counts for exp(-t / `LATELY_S`) of a rate."""
FIRST_TOKENS_S = 10.0
"""First tokens that came longer ago say nothing of now."""
FIRST_TOKENS_KEPT = 256
KNOWN_AFTER_S = 1.0
"""Queues that have lasted less say nothing yet of the speed."""
_SHORTEST_S = 0.05
"""Steps that took less in all say little of the speed: two may have been seen at once."""
PERCENTILE = 0.95
"""Of the times to the first token."""


class EngineUse(NamedTuple):
    """The state of one engine, in figures that Serve can carry."""

    running: float = 0.0
    """Requests in its batch."""
    waiting: float = 0.0
    """Requests that wait for a place there."""
    waiting_tokens: float = 0.0
    """Prompt tokens that it has not computed."""
    rows_used: float = 0.0
    """Share of `max_num_seqs` that runs."""
    blocks_used: float = 0.0
    """Share of the KV cache that running requests hold."""
    arriving_tokens_s: float = 0.0
    """Prompt tokens that came in lately, a second, without those of requests that move here."""
    arriving_requests_s: float = 0.0
    """Likewise."""
    done_tokens_s: float = 0.0
    """Prompt tokens that it got done a second while others had to wait, for whatever: computation,
    rows or blocks. 0 where none had to lately. Those of preempted requests count each time they are
    computed, as they do each time in what waits, which is to be divided by this."""
    step_tokens_s: float = 0.0
    """Prompt tokens a second of the steps that computed any: it can do as many at least, where rows
    and blocks last."""
    ttft_s: float = 0.0
    """95th percentile of the latest times from a request's arrival to its first token."""


class LoadMeter:
    """Follows an engine, step by step.

    Args:
        max_num_seqs: rows of its batch.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self._max_num_seqs = max_num_seqs
        self._load = EngineLoad()
        self._followed_at: float | None = None
        self._tokens = self._requests = 0.0
        """That came lately."""
        self._arrived = 0
        """Prompt tokens that came with the last step."""
        self._queued = False
        """Whether prompt tokens have been waiting for longer than two steps."""
        self._done_tokens = self._done_seconds = 0.0
        """What was done lately while they were, and how long that took."""
        self._step_tokens = self._step_seconds = 0.0
        """Of late steps that computed prompt tokens."""
        self._first_tokens: deque[tuple[float, float]] = deque(maxlen=FIRST_TOKENS_KEPT)

    def follow(self, load: EngineLoad, now: float) -> None:
        """Take over the load after a step.

        Args:
            load: the engine's.
            now: seconds of a clock that does not go back.
        """
        last, since = self._load, self._followed_at
        self._load, self._followed_at = load, now
        if since is None:
            return
        elapsed = now - since
        fading = exp(-elapsed / LATELY_S)
        new = load.new_tokens - last.new_tokens
        self._tokens = self._tokens * fading + new
        self._requests = self._requests * fading + load.new_requests - last.new_requests
        self._time(load.prefilled_tokens - last.prefilled_tokens, elapsed, fading, last)
        # What came within the last two steps could not have been begun: one is planned ahead.
        arrived = max(new, _tokens_seen(load) - _tokens_seen(last))  # with what moved here
        self._queued = load.waiting_tokens > arrived + self._arrived
        self._arrived = arrived

    def _time(self, done: int, elapsed: float, fading: float, last: EngineLoad) -> None:
        """Count the prompt tokens of a step, and how long they took, where that says something."""
        self._done_tokens *= fading
        self._done_seconds *= fading
        if self._queued:
            self._done_tokens += done
            self._done_seconds += elapsed
        self._step_tokens *= fading
        self._step_seconds *= fading
        if done > 0 and last.num_running:  # else it was idle for a part of the time
            self._step_tokens += done
            self._step_seconds += elapsed

    def note_first_token(self, seconds: float, now: float) -> None:
        """Take over how long a request has waited for its first token, which has just come."""
        self._first_tokens.append((now, seconds))

    def read(self, now: float) -> EngineUse:
        """The figures now."""
        load = self._load
        since = now if self._followed_at is None else self._followed_at
        fading = exp((since - now) / LATELY_S) / LATELY_S
        known = self._done_seconds >= KNOWN_AFTER_S
        return EngineUse(
            running=float(load.num_running),
            waiting=float(load.num_waiting),
            waiting_tokens=float(load.waiting_tokens),
            rows_used=load.num_running / self._max_num_seqs,
            blocks_used=1 - load.free_blocks / load.total_blocks if load.total_blocks else 0.0,
            arriving_tokens_s=self._tokens * fading,
            arriving_requests_s=self._requests * fading,
            done_tokens_s=self._done_tokens / self._done_seconds if known else 0.0,
            step_tokens_s=self._step_tokens / max(self._step_seconds, _SHORTEST_S),
            ttft_s=self._ttft(now),
        )

    def _ttft(self, now: float) -> float:
        while self._first_tokens and now - self._first_tokens[0][0] > FIRST_TOKENS_S:
            self._first_tokens.popleft()
        times = sorted(seconds for _, seconds in self._first_tokens)
        return times[ceil(PERCENTILE * len(times)) - 1] if times else 0.0


def _tokens_seen(load: EngineLoad) -> int:
    return load.prefilled_tokens + load.waiting_tokens
