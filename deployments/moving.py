"""Requests of engines that are to stop: they go on elsewhere rather than keep the engine."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence

from deployments.load_table import LoadTable
from deployments.trunk import TrunkHub

logger = logging.getLogger("ray.serve")

LOOK_S = 0.1
"""While an engine that is to stop has requests, there is a look whether others have space for some
about this often. In between, these report what has come to them, from other ingress replicas as
well: intervals vary, so that those do not all look at the same moment."""
REFUSALS = 16
"""A look ends when so many requests found no space. Others would hardly find any, and to ask for
each of a thousand would hold up all streams."""


class Mover:
    """Looks after the requests of engines that Serve has taken out of service: those that another
    engine could go on with at once move there. The others end where they are. Belongs to one event
    loop.

    Args:
        hub: knows who waits for the requests.
        table: says which engines are in service, and where there is space.
    """

    def __init__(self, hub: TrunkHub, table: LoadTable) -> None:
        self._hub = hub
        self._table = table
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        table.on_change(self._on_change)

    def _on_change(self) -> None:
        self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        if self._task is None or self._task.done():
            self._task = self._loop.create_task(self._clear())

    async def _clear(self) -> None:
        """Move requests until none is left on an engine that is to stop."""
        num_moved = 0
        while self._table.left_behind():
            await asyncio.sleep(LOOK_S * random.uniform(0.5, 1.5))
            num_moved += self._move(self._table.left_behind())
        if num_moved:
            logger.info("%d requests of engines that stop have moved", num_moved)

    def _move(self, left: Sequence[str]) -> int:
        """Move those that find space; returns how many did."""
        num_moved = num_refused = 0
        for request_id in random.sample(left, len(left)):  # each gets its turn, in some look
            if self._hub.make_way(request_id):
                num_moved += 1
            else:
                num_refused += 1
            if num_refused == REFUSALS:
                break
        return num_moved
