"""The requests of this process that no engine has been chosen for."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Unplaced(NamedTuple):
    """One of them."""

    deployment: str
    """Whose engines may run it."""
    num_tokens: int
    """Of it, to compute."""
    on_place: Callable[[str], None]
    """Called with the engine once it is chosen, in the thread of the router."""


class UnplacedRequests:
    """All of them, by request id. Not thread-safe."""

    def __init__(self) -> None:
        self._requests: dict[str, Unplaced] = {}

    def add(self, request_id: str, request: Unplaced) -> None:
        """Count a request from now on."""
        self._requests[request_id] = request

    def pop(self, request_id: str) -> Unplaced | None:
        """Count a request no longer; returns it if it was counted."""
        return self._requests.pop(request_id, None)

    def has_others(self, deployment: str, request_id: str) -> bool:
        """Whether other requests to a deployment are counted."""
        return any(
            each.deployment == deployment and other != request_id
            for other, each in self._requests.items()
        )

    def tokens(self, deployment: str) -> list[int]:
        """Tokens to compute of each request to a deployment."""
        return [
            each.num_tokens for each in self._requests.values() if each.deployment == deployment
        ]
