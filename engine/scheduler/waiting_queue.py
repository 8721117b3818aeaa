"""Requests that wait for a row and blocks."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from engine.request import Request
from engine.scheduler.policies import Policy


class WaitingQueue:
    """A heap in policy order, beside the same requests in the order in which they came.

    Push, pop and discard take O(log n). The heap drops discarded entries when they surface.
    """

    def __init__(self, policy: Policy, clock: Callable[[], float]) -> None:
        self.num_prompt_tokens = 0
        """Prompt tokens of all waiting requests."""
        self.num_to_decode = 0
        """Waiting requests that sample more than one token."""
        self._policy = policy
        self._clock = clock
        self._heap: list[tuple[tuple[Any, ...], int, str]] = []
        self._members: OrderedDict[str, tuple[int, Request]] = OrderedDict()  # oldest first
        self._pushes = 0

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Request]:
        return (request for _, request in self._members.values())

    def push(self, request: Request) -> None:
        """Queue a request from now on."""
        request.queued_since = self._clock()
        self._pushes += 1
        self._members[request.request_id] = (self._pushes, request)
        entry = (self._policy.waiting_key(request), self._pushes, request.request_id)
        heapq.heappush(self._heap, entry)
        self.num_prompt_tokens += request.num_prompt_tokens
        self.num_to_decode += request.decodes

    def peek(self) -> Request | None:
        """The request to admit next, or None when none waits."""
        if not self._members:
            return None
        _, oldest = next(iter(self._members.values()))
        if self._clock() - oldest.queued_since >= self._policy.max_wait_s:
            return oldest
        while True:
            _, push, request_id = self._heap[0]
            member = self._members.get(request_id)
            if member is not None and member[0] == push:
                return member[1]
            heapq.heappop(self._heap)

    def discard(self, request: Request) -> None:
        """Take a waiting request out of the queue."""
        del self._members[request.request_id]
        self.num_prompt_tokens -= request.num_prompt_tokens
        self.num_to_decode -= request.decodes

    def clear(self) -> None:
        """Forget all requests."""
        self._heap.clear()
        self._members.clear()
        self.num_prompt_tokens = self.num_to_decode = 0
