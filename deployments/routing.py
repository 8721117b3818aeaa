"""Routes each request to the engine that will begin it soonest, booking its load in the same step.

Ray Serve copies this module by value into its processes: nothing here may hold state, and what is
shared is imported inside the methods.
"""

from __future__ import annotations

import asyncio
from typing import Any

from ray.serve.request_router import (
    FIFOMixin,
    PendingRequest,
    RequestRouter,
    RunningReplica,
)

from deployments.engine_state import Traits
from deployments.placement import AFFINITY_MARGIN, POLICIES, Booking

RECHECK_S = 0.1
"""The request at the head of a line looks for room this often even if nothing told of any: what
those of lost engines need, which wait for a time at most for answers of the others."""
REFUSED_PAUSE_S = 2.0
"""A call that a replica turned away is made again after this long. Nobody waits for it: the engine
has its request."""


Line = dict[asyncio.Future[None], Booking]
"""Requests for which no engine has had room yet, in order, by what tells that one has."""


class EngineRouter(FIFOMixin, RequestRouter):  # type: ignore[misc]
    """Chooses and books without giving up control in between; requests wait here, in the order of
    their arrival, while the load table knows of no engine with room.

    Overrides the private method that Serve's own capacity-queue router overrides too: the public
    hook only ranks, and requests that arrive together would all see the same idle engine.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from deployments.load_table import load_table

        super().__init__(*args, **kwargs)
        self._interrupted: dict[str, Line] = {}
        """What an engine's loss interrupted, by that engine's options, which say where it may go
        on: clients have been reading it for a while."""
        self._line: Line = {}
        self._own_loop: asyncio.AbstractEventLoop | None = None
        self._recheck: asyncio.TimerHandle | None = None
        self.initialize_state()
        load_table().on_room(self._tell_of_room)

    def initialize_state(
        self, policy: str = "prefix_load", margin: float = AFFINITY_MARGIN
    ) -> None:
        """Called by Serve with the `request_router_kwargs` of the deployment."""
        self._policy = POLICIES[policy](margin)
        self._tell_rules()

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Tell the load table which engines Serve has in service."""
        from deployments.load_table import load_table

        super().update_replicas(replicas)
        traits = {r.replica_id.unique_id: Traits(**r.replica_metadata) for r in replicas}
        load_table().set_members(self._deployment_id.name, traits, traits)
        self._tell_rules()

    def _tell_rules(self) -> None:
        """Let requests be booked as this router would, before Serve gets to ask it."""
        from deployments.load_table import load_table

        load_table().set_rules(self._deployment_id.name, self._limits(), self._policy)

    def _limits(self) -> dict[str, int]:
        return {r.replica_id.unique_id: r.max_ongoing_requests for r in self._replicas_list}

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        from deployments.load_table import load_table

        booking = _booking(pending_request)
        if is_retry:
            # Its replica turned the call away, as calls of other ingress replicas had come first
            # and all are counted, or Serve does not know whether the call came.
            await asyncio.sleep(REFUSED_PAUSE_S)
        elif load_table().engine_of(booking.request_id) is None:
            await self._place(booking)
        return await self._follow(booking.request_id)

    async def _place(self, booking: Booking) -> None:
        """Book as soon as there is room, and none who came before waits for it.

        Raises:
            EngineDead: the request has ended.
        """
        from deployments.load_table import load_table
        from engine.errors import EngineDead

        if not load_table().is_wanted(booking.request_id):
            raise EngineDead("the request has ended.")
        self._own_loop = asyncio.get_running_loop()
        line = self._line
        if booking.resumed:
            line = self._interrupted.setdefault(booking.options, {})
        placed = self._own_loop.create_future()
        line[placed] = booking
        try:
            if len(line) == 1:
                self._fill()
            await placed
        finally:
            line.pop(placed, None)

    def _fill(self) -> None:
        """Book those at the heads of the lines, one after the other, until each finds no room."""
        for line in (*self._interrupted.values(), self._line):
            while line:
                placed, booking = next(iter(line.items()))
                if not self._settle(placed, booking):
                    break
                del line[placed]
        self._interrupted = {key: line for key, line in self._interrupted.items() if line}
        if self._recheck is not None:
            self._recheck.cancel()
        self._recheck = None
        if self._own_loop is not None and (self._interrupted or self._line):
            self._recheck = self._own_loop.call_later(RECHECK_S, self._fill)

    def _settle(self, placed: asyncio.Future[None], booking: Booking) -> bool:
        """Try to book; returns whether the request need not wait any longer."""
        from deployments.load_table import load_table
        from engine.errors import EngineDead

        if placed.done():
            return True  # its caller has left
        try:
            if not load_table().is_wanted(booking.request_id):
                raise EngineDead("the request has ended.")
            if load_table().book(self._limits(), booking, self._policy) is None:
                return False
            placed.set_result(None)
        except Exception as error:  # the caller's; those behind it go on
            placed.set_exception(error)
        return True

    async def _follow(self, request_id: str) -> RunningReplica:
        """The replica of the engine where a request was booked, and to which it was sent.

        If that is out of service by now, there is no call: the trunk tells what becomes of the
        request.

        Raises:
            EngineDead: the request has ended, or gone on elsewhere.
        """
        from deployments.load_table import load_table
        from engine.errors import EngineDead

        while (engine_id := load_table().engine_of(request_id)) is not None:
            for replica in self._replicas_list:
                if replica.replica_id.unique_id == engine_id:
                    return replica
            await asyncio.sleep(REFUSED_PAUSE_S)
        raise EngineDead("the request has left the engine.")

    def _tell_of_room(self) -> None:
        """Called in whatever thread changed the load table."""
        if self._own_loop is not None:
            self._own_loop.call_soon_threadsafe(self._fill)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Never reached; the base class insists on it."""
        return [candidate_replicas]


def _booking(pending_request: PendingRequest) -> Booking:
    """The `Booking` among the call's arguments."""
    booking: Booking = pending_request.kwargs.get("booking") or pending_request.args[0]
    return booking
