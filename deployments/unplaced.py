"""The requests of this process that no engine has been chosen for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple


class Unplaced(NamedTuple):
    """One of them."""

    deployment: str
    """Whose engines may run it."""
    num_tokens: int
    """Of it, to compute."""
    on_place: Callable[[str], None]
    """Called with the engine once it is chosen, in the thread that books."""


class UnplacedRequests:
    """All of them, by request id. Not thread-safe."""

    def __init__(self) -> None:
        self._requests: dict[str, Unplaced] = {}
        self._numbers: Counter[str] = Counter()
        """By deployment."""

    def add(self, request_id: str, request: Unplaced) -> None:
        """Count a request from now on."""
        self.pop(request_id)
        self._requests[request_id] = request
        self._numbers[request.deployment] += 1

    def pop(self, request_id: str) -> Unplaced | None:
        """Count a request no longer; returns it if it was counted."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            self._numbers[request.deployment] -= 1
        return request

    def counts(self, request_id: str) -> bool:
        """Whether a request is counted."""
        return request_id in self._requests

    def has_others(self, deployment: str, request_id: str) -> bool:
        """Whether requests to a deployment are counted beside this one of its own."""
        return self._numbers[deployment] > self.counts(request_id)

    def tokens(self, deployment: str) -> list[int]:
        """Tokens to compute of each request to a deployment."""
        return [
            each.num_tokens for each in self._requests.values() if each.deployment == deployment
        ]
