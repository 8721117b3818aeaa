"""One engine as this process sees it: its last report, and what was sent there since."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from deployments.prefix_index import PrefixIndex
from engine.outputs import EngineLoad

FIRST_PAUSE_S = 0.02
"""An engine that turns a request away gets none for about this long, and twice as long each time
that it does so again, up to `LAST_PAUSE_S`."""
LAST_PAUSE_S = 1.0
CROWDED_SHARE = 0.05
"""Share of an engine's blocks that a request should leave to those that run."""


@dataclass(slots=True)
class EngineState:
    """Load, bookings on top of it, and cache of one engine."""

    load: EngineLoad = field(default_factory=EngineLoad)
    index: PrefixIndex = field(default_factory=PrefixIndex)
    bookings: dict[str, int] = field(default_factory=dict)
    """Tokens to compute for each request that was sent there and that `load` does not count yet."""
    booked_tokens: int = 0
    """Sum of `bookings`."""
    reported_at: float | None = None
    """`time.monotonic()` of the last report; None before the first."""
    last_booking: float = field(default_factory=random.random)
    """Number of its last booking; before the first a fraction, so that ingress replicas do not all
    begin with the same one of several idle engines."""
    down: bool = False
    refusals: int = 0
    """Requests it turned away since it last took one."""
    closed_until: float = 0.0
    """`time.monotonic()` of the end of the pause after a refusal."""

    @property
    def num_requests(self) -> int:
        """Requests that it runs, that wait there, and that are on their way."""
        return self.load.num_running + self.load.num_waiting + len(self.bookings)

    @property
    def pending_tokens(self) -> int:
        """Tokens that it will compute before it comes to those of a new request."""
        return self.load.waiting_tokens + self.booked_tokens

    def has_room(self, max_requests: int) -> bool:
        """Whether it would take one more request, as far as this process knows."""
        return self.num_requests < max_requests and time.monotonic() >= self.closed_until

    def is_crowded(self, num_tokens: int) -> bool:
        """Whether a request with so many tokens to compute might have to wait for blocks."""
        spare_blocks = self.load.free_blocks - CROWDED_SHARE * self.load.total_blocks
        known = self.load.block_size > 0
        return known and spare_blocks * self.load.block_size < self.pending_tokens + num_tokens

    def book(self, request_id: str, num_tokens: int) -> None:
        """Count a request that is sent there."""
        self.bookings[request_id] = num_tokens
        self.booked_tokens += num_tokens

    def settle(self, request_id: str) -> bool:
        """Count the request no longer; whether it was counted."""
        num_tokens = self.bookings.pop(request_id, None)
        self.booked_tokens -= num_tokens or 0
        return num_tokens is not None

    def report(self, load: EngineLoad, reflected: Iterable[str]) -> None:
        """Take over a fresh load; the bookings of `reflected` requests are part of it now."""
        if load.block_size and load.total_blocks != self.load.total_blocks:
            self.index.resize(load.total_blocks * load.block_size)
        self.load = load
        self.down = False
        self.reported_at = time.monotonic()
        for request_id in reflected:
            if self.settle(request_id):
                self.refusals = 0

    def close(self) -> None:
        """Begin the pause after a refusal; its length varies, so that ingresses do not meet."""
        pause = min(FIRST_PAUSE_S * 2 ** min(self.refusals, 10), LAST_PAUSE_S)
        self.refusals += 1
        self.closed_until = time.monotonic() + pause * random.uniform(0.5, 1.0)
