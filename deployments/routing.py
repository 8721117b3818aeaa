"""Routes each request to the least loaded engine, booking its load in the same step.

Ray Serve copies this module by value into its processes: nothing here may hold state, and what is
shared is imported inside the methods.
"""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

from ray.serve.request_router import (
    FIFOMixin,
    PendingRequest,
    RequestRouter,
    RunningReplica,
)

RETRY_DELAY_S = 0.02
"""Pause before a request that a full engine turned away is routed again."""


class Booking(NamedTuple):
    """What the router needs to know of a request; the second argument of every routed call."""

    request_id: str
    num_tokens: int
    """Tokens still to be computed before the first new one comes."""


class LeastLoadedRouter(FIFOMixin, RequestRouter):  # type: ignore[misc]
    """Chooses and books without giving up control in between.

    Overrides the private method that Serve's own capacity-queue router overrides too: the public
    hook only ranks, and requests that arrive together would all see the same idle engine.
    """

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Tell the load table which engines Serve has in service."""
        from deployments.load_table import load_table

        super().update_replicas(replicas)
        load_table().set_members(
            self._deployment_id.name, [replica.replica_id.unique_id for replica in replicas]
        )

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        from deployments.load_table import load_table

        booking = _booking(pending_request)
        refused_by = load_table().engine_of(booking.request_id) if is_retry else None
        if is_retry:
            await asyncio.sleep(RETRY_DELAY_S)
        while not self._replicas_list:
            self._replicas_updated_event.clear()
            await self._replicas_updated_event.wait()
        replicas = {replica.replica_id.unique_id: replica for replica in self._replicas_list}
        chosen = load_table().book(
            replicas.keys(), booking.request_id, booking.num_tokens, avoid=refused_by
        )
        return replicas[chosen]

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Never reached; the base class insists on it."""
        return [candidate_replicas]


def _booking(pending_request: PendingRequest) -> Any:
    """The `Booking` among the call's arguments."""
    return pending_request.kwargs.get("booking") or pending_request.args[1]
