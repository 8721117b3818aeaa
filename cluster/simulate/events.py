"""What happens when, in simulated time."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from typing import Any


class Events:
    """A queue of calls; those of the same time come in the order in which they were planned."""

    def __init__(self) -> None:
        self.now = 0.0
        """Seconds since the start."""
        self._queue: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._order = count()

    def at(self, when: float, happen: Callable[[Any], None], subject: Any = None) -> None:
        """Plan `happen(subject)` for the time `when`, which is not past."""
        heapq.heappush(self._queue, (when, next(self._order), happen, subject))

    def run(self) -> None:
        """Let everything happen, what is planned meanwhile included."""
        queue, pop = self._queue, heapq.heappop
        while queue:
            self.now, _, happen, subject = pop(queue)
            happen(subject)
