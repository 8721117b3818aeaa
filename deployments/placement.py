"""Which engine a request goes to."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from deployments.engine_state import EngineState

AFFINITY_MARGIN = 0.25
"""A request returns to the engine that has the beginning of its prompt in its cache unless that one
has this share more traffic than the mean. The bound is that of "Consistent Hashing with Bounded
Loads" (Mirrokni, Thorup, Zadimoghaddam, 2018)."""
LITTLE_TRAFFIC = 16
"""A mean below this is taken for this: where there is little to do, an engine that does most of it
is no reason to compute a long prompt anew."""
REQUEST_PRICE = 64
"""Tokens of prefill that a request on an engine weighs as much as. High enough for a burst of
prompts of unequal lengths to be spread evenly, low enough for a chat to return to an engine that
has a few requests more."""
PATIENCE = 2048
"""Tokens of prefill ahead of a request that do not count: they fit into the step that it will be in
or the one before, and to avoid that wait is not worth an uneven spread."""


class Booking(NamedTuple):
    """What the router needs to know of a request; the argument of every routed call."""

    request_id: str
    num_tokens: int
    """Tokens that must be in the cache before the first new one comes."""
    blocks: Sequence[bytes] = ()
    """See `request_blocks`; empty if the request cannot start from cached blocks."""
    resumed: bool = False
    """Whether it has run before, on an engine that was lost or is to stop: it waits in no line."""
    options: str = ""
    """`Traits.options` of that engine: with others it would go on as another model."""

    def __reduce__(self) -> tuple[type[Booking], tuple[str, int]]:
        """Leave the blocks behind when the call crosses to the engine's replica."""
        return Booking, (self.request_id, self.num_tokens)


class Place(NamedTuple):
    """An engine for a request."""

    engine_id: str
    num_tokens: int
    """Tokens that it has to compute there."""


class Policy(Protocol):
    """A way to choose an engine."""

    def choose(
        self,
        engines: Mapping[str, EngineState],
        candidates: Collection[str],
        booking: Booking,
        now: float,
    ) -> Place:
        """Choose an engine for a request.

        Args:
            engines: engine id → state, of all in reach that share the load.
            candidates: ids of those that may be chosen; at least one.
            booking: the request.
            now: time, in seconds.
        """


@dataclass(frozen=True)
class PrefixLoad:
    """The engine that has the least to compute before the first token of the request.

    That is the prefill ahead of it beyond `PATIENCE`, those tokens of its own that the engine's
    cache lacks, and a price for each request there. A cache counts for nothing on an engine that is
    at work and busier than the mean by `margin`. Engines short of blocks come after the others. Of
    equals, the one that has been without a booking for longest is taken.
    """

    margin: float = AFFINITY_MARGIN
    """See `AFFINITY_MARGIN`."""

    def choose(
        self,
        engines: Mapping[str, EngineState],
        candidates: Collection[str],
        booking: Booking,
        now: float,
    ) -> Place:
        """See `Policy.choose`."""
        traffic = {engine_id: state.traffic(now) for engine_id, state in engines.items()}
        mean = sum(traffic.values()) / len(traffic)
        bound = (1 + self.margin) * max(mean, LITTLE_TRAFFIC)

        def missing(engine_id: str) -> int:
            state = engines[engine_id]
            too_busy = traffic[engine_id] > bound and state.num_requests > 0
            return booking.num_tokens if too_busy else _missing(state, booking)

        def rank(engine_id: str) -> tuple[bool, int, float]:
            state = engines[engine_id]
            own = missing(engine_id)
            ahead = max(0, state.pending_tokens - PATIENCE)
            cost = ahead + own + REQUEST_PRICE * state.num_requests
            return state.is_crowded(own), cost, state.last_booking

        chosen = min(candidates, key=rank)
        return Place(chosen, missing(chosen))


class RoundRobin:
    """The engine that has been without a booking for longest."""

    def choose(
        self,
        engines: Mapping[str, EngineState],
        candidates: Collection[str],
        booking: Booking,
        now: float,
    ) -> Place:
        """See `Policy.choose`."""
        chosen = min(candidates, key=lambda i: engines[i].last_booking)
        return Place(chosen, _missing(engines[chosen], booking))


class PowerOfTwo:
    """Of two engines drawn at random, the one with fewer tokens queued, then with fewer requests.

    "The Power of Two Choices in Randomized Load Balancing" (Mitzenmacher, 2001).
    """

    def choose(
        self,
        engines: Mapping[str, EngineState],
        candidates: Collection[str],
        booking: Booking,
        now: float,
    ) -> Place:
        """See `Policy.choose`."""

        def rank(engine_id: str) -> tuple[int, int]:
            state = engines[engine_id]
            return state.pending_tokens, state.num_requests

        drawn = random.sample(list(candidates), min(2, len(candidates)))
        chosen = min(drawn, key=rank)
        return Place(chosen, _missing(engines[chosen], booking))


POLICIES: dict[str, Callable[[float], Policy]] = {
    "prefix_load": PrefixLoad,
    "round_robin": lambda _: RoundRobin(),
    "power_of_two": lambda _: PowerOfTwo(),
}
"""Name → policy for an affinity margin, which only the first heeds."""


def _missing(state: EngineState, booking: Booking) -> int:
    """Tokens of the request that the engine's cache is likely to lack."""
    return booking.num_tokens - state.index.overlap(booking.blocks)
