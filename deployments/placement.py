"""Which engine a request goes to."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from deployments.engine_state import EngineState

AFFINITY_MARGIN = 0.25
"""An engine with this much more requests than the mean is passed over even by those requests whose
beginning is in its cache. This is the c of "Consistent Hashing with Bounded Loads" (Mirrokni,
Thorup, Zadimoghaddam, 2018), where it bounds the load of every server."""
FEW_REQUESTS = 8
"""Means below this are taken for this: on engines that have next to nothing to do, one request more
or less is no imbalance to recompute a long prompt for."""
MEAN_LOAD_PRICE = 4096
"""Tokens of prefill that the mean number of requests on an engine weighs as much as. A request on
idle engines so weighs 512: more than prompts usually differ by, so that a burst is spread evenly,
and less than the history of a chat, which returns to its cache."""


class Booking(NamedTuple):
    """What the router needs to know of a request; the second argument of every routed call."""

    request_id: str
    num_tokens: int
    """Tokens that must be in the cache before the first new one comes."""
    blocks: Sequence[bytes] = ()
    """See `request_blocks`; empty if the request does not start from cached blocks."""

    def __reduce__(self) -> tuple[type[Booking], tuple[str, int]]:
        """Leave the blocks behind when the call crosses to the engine's replica."""
        return Booking, (self.request_id, self.num_tokens)


class Place(NamedTuple):
    """An engine for a request."""

    engine_id: str
    num_tokens: int
    """Tokens that it has to compute there."""


def choose(
    engines: Mapping[str, EngineState],
    open_to: Collection[str],
    booking: Booking,
    margin: float = AFFINITY_MARGIN,
) -> Place:
    """Choose the engine that is likely to give the first token soonest.

    That is the one with the fewest tokens to compute first: those pending there, those of the
    prompt that its cache lacks, and a price for the requests that it has. Engines that are lost, or
    short of blocks, or busier than the mean by more than `margin`, are taken only when all are so.
    Among equals it is the one that has been without a booking for longest.

    Args:
        engines: engine id → state, of all engines; their mean load is what `margin` refers to.
        open_to: those that may be chosen; at least one.
        booking: the request.
        margin: see `AFFINITY_MARGIN`.
    """
    in_service = [state for state in engines.values() if not state.down] or engines.values()
    mean = (1 + sum(state.num_requests for state in in_service)) / len(in_service)
    mean = max(mean, FEW_REQUESTS)

    def rank(engine_id: str) -> tuple[bool, bool, bool, float, float]:
        state = engines[engine_id]
        num_requests = state.num_requests
        missing = booking.num_tokens - state.index.overlap(booking.blocks)
        return (
            state.down,
            state.is_crowded(missing),
            num_requests + 1 > (1 + margin) * mean,
            state.pending_tokens + missing + MEAN_LOAD_PRICE * num_requests / mean,
            state.last_booking,
        )

    chosen = min(open_to, key=rank)
    return Place(chosen, booking.num_tokens - engines[chosen].index.overlap(booking.blocks))
