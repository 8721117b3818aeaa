"""Who gives up its blocks when there are too few."""

from __future__ import annotations

from collections.abc import Sequence

from engine.kv_cache.block_allocator import BlockAllocator
from engine.request import Request, Status
from engine.scheduler.step_builder import ScheduledStep


def choose_victim(candidates: Sequence[Request], blocks: BlockAllocator) -> Request:
    """The running request whose preemption wastes least.

    Args:
        candidates: in policy order: the request that needs a block and all those behind it. So the
            first of all running requests never yields to another, and always gets on.
        blocks: knows what each holds and shares.

    Returns:
        Of those that free a block at all, the one that loses the fewest computed tokens, the last
        in order among equals; the first candidate itself when none frees any.
    """
    useful = [request for request in reversed(candidates) if blocks.frees_blocks(request)]
    return min(useful, key=lambda request: _waste(request, blocks), default=candidates[0])


def _waste(request: Request, blocks: BlockAllocator) -> int:
    if request.num_tokens >= request.max_total_tokens:
        return 0  # its last token is in flight: it needs its blocks no more
    return blocks.wasted_by_preempting(request)


class ForcedPreemption:
    """For tests: names a victim at every so many steps, another one each time.

    Only requests that the step before sampled a token for: whoever is preempted has then got on
    since it started, so every request ends even when one is preempted at every step.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._count = 0

    def victim(self, step: int, last: ScheduledStep | None) -> Request | None:
        """The request to preempt before `step`, if any; `last` is the step scheduled before."""
        if not self._every or step % self._every or last is None:
            return None
        candidates = [request for request in last.sampled if request.status is Status.RUNNING]
        if not candidates:
            return None
        self._count += 1
        return candidates[self._count % len(candidates)]
