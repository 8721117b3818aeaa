"""One engine as this process sees it: its last report, and what was sent there since."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import exp
from typing import NamedTuple

from deployments.backlog import QueueSpeed
from deployments.prefix_index import PrefixIndex
from engine.outputs import EngineLoad

LATELY_S = 10.0
"""About how long a request that has ended still counts as traffic. Chats pause, and come back to
the engine that has them in its cache: one that is given all new chats while they pause would have
too many when they all speak."""
SILENT_S = 2.5
"""An engine that has not reported for this long is given no requests until it does, though it is
not taken for lost yet: its load is due every second. Those of a lost engine would else move to one
that has stopped as well, and wait there for it to be missed."""
CROWDED_SHARE = 0.05
"""Share of an engine's blocks that a request should leave to those that run."""
LITTLE_AHEAD = 2048
"""Tokens of prefill ahead of a request that has begun elsewhere for which its stream may pause."""


class Traits(NamedTuple):
    """What does not change about an engine."""

    options: str = ""
    """Engines of which this is equal continue each other's requests as if there were only one."""
    max_num_seqs: int = 0
    """Rows of its batch; 0 where nobody has told."""


@dataclass(slots=True)
class EngineState:
    """Load, bookings on top of it, and cache of one engine. Times are seconds of one clock."""

    load: EngineLoad = field(default_factory=EngineLoad)
    traits: Traits = field(default_factory=Traits)
    index: PrefixIndex = field(default_factory=PrefixIndex)
    bookings: dict[str, tuple[int, Sequence[bytes]]] = field(default_factory=dict)
    """Requests that were sent there and that `load` does not count yet: tokens to compute and
    blocks, by request id."""
    booked_tokens: int = 0
    """Tokens of all `bookings`."""
    sent: float = 0.0
    """`sent_lately` at the time `last_sent`."""
    last_sent: float = 0.0
    reported_at: float | None = None
    """Time of the last report; None before the first."""
    heard_at: float | None = None
    """The same by the clock of `LoadTable`'s attention."""
    last_booking: float = field(default_factory=random.random)
    """Number of its last booking; before the first a fraction, so that ingress replicas do not all
    begin with the same one of several idle engines."""
    down: bool = False
    speed: QueueSpeed = field(default_factory=QueueSpeed)

    @property
    def num_requests(self) -> int:
        """Requests that it runs, that wait there, and that are on their way."""
        return self.load.num_running + self.load.num_waiting + len(self.bookings)

    @property
    def pending_tokens(self) -> int:
        """Tokens that it will compute before it comes to those of a new request."""
        return self.load.waiting_tokens + self.booked_tokens

    def traffic(self, now: float) -> float:
        """Requests there, and those that were sent there lately."""
        return self.num_requests + self.sent_lately(now)

    def sent_lately(self, now: float) -> float:
        """Requests sent there, each counted for exp(-t / `LATELY_S`) when it was t seconds ago."""
        return self.sent * exp((self.last_sent - now) / LATELY_S)

    def in_reach(self, attended: float) -> bool:
        """Whether it lives and moves, as far as is known after so many seconds of attention."""
        silent = self.heard_at is not None and attended - self.heard_at > SILENT_S
        return not (self.down or silent or self.load.overdue)

    def has_reported(self, since: float) -> bool:
        """Whether it has told its load since a time."""
        return self.reported_at is not None and self.reported_at >= since

    def has_room(self, max_requests: int) -> bool:
        """Whether it would take one more request, as far as this process knows."""
        return self.num_requests < max_requests

    def has_row(self, num_before: int = 0) -> bool:
        """Whether it would run one more request at once, after so many others."""
        return self.num_requests + num_before < self.traits.max_num_seqs

    def has_space(self, num_tokens: int, num_before: int, tokens_before: int) -> bool:
        """Whether a request that runs elsewhere would have next to no wait here for its turn.

        Args:
            num_tokens: of it, to compute.
            num_before: requests that may come before it.
            tokens_before: to compute, of these.
        """
        ahead = self.pending_tokens + tokens_before
        free = self.has_row(num_before) and not self.is_crowded(num_tokens + tokens_before)
        return self.reported_at is not None and free and ahead <= LITTLE_AHEAD

    def is_crowded(self, num_tokens: int) -> bool:
        """Whether a request with so many tokens to compute might have to wait for blocks."""
        spare_blocks = self.load.free_blocks - CROWDED_SHARE * self.load.total_blocks
        known = self.load.block_size > 0
        return known and spare_blocks * self.load.block_size < self.pending_tokens + num_tokens

    def book(self, request_id: str, num_tokens: int, blocks: Sequence[bytes], now: float) -> None:
        """Count a request that is sent there."""
        self._count_sent(now)
        self.bookings[request_id] = num_tokens, blocks
        self.booked_tokens += num_tokens

    def unbook(self, request_id: str) -> Sequence[bytes] | None:
        """Count the request no longer; returns its blocks if it was counted."""
        num_tokens, blocks = self.bookings.pop(request_id, (0, None))
        self.booked_tokens -= num_tokens
        return blocks

    def report(
        self,
        load: EngineLoad,
        reflected: Iterable[str],
        heard: Iterable[Sequence[bytes]],
        now: float,
    ) -> None:
        """Take over a report; see `LoadTable.report`."""
        if load.block_size and load.total_blocks != self.load.total_blocks:
            self.index.resize(load.total_blocks * load.block_size)
        if self.reported_at is not None:
            self.speed.follow(self.load, load, now - self.reported_at)
        self.load = load
        self.down = False
        self.reported_at = now
        for request_id in reflected:
            blocks = self.unbook(request_id)
            if blocks is not None:
                self.index.use(blocks)
        for blocks in heard:
            self._count_sent(now)
            self.index.use(blocks)

    def _count_sent(self, now: float) -> None:
        self.sent = self.sent_lately(now) + 1
        self.last_sent = now
