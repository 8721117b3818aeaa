"""The calls that an ingress makes to an engine actor."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from typing import Protocol

import ray
from ray.exceptions import ObjectRefStreamEndOfStreamError

from deployments.names import SERVE_NAMESPACE, engine_actor_name


class EngineLink(Protocol):
    """What an ingress needs of an engine."""

    def subscribe(self, subscriber_id: str) -> AsyncIterator[bytes]:
        """Read this subscriber's trunk."""

    def submit(self, batch: bytes) -> Awaitable[None]:
        """Send an encoded list of `Submission`s at once; what is returned raises if the engine did
        not take it."""

    def acknowledge(self, subscriber_id: str, count: int) -> None:
        """Tell that so many more messages have been read, or of 0 ask for one; returns at once."""

    def abort(self, request_ids: list[str]) -> None:
        """Ask for the end of requests; returns at once."""


class RayEngineLink:
    """The engine actor of a Serve replica, found by name."""

    def __init__(self, engine_id: str) -> None:
        self._actor = ray.get_actor(engine_actor_name(engine_id), namespace=SERVE_NAMESPACE)

    async def subscribe(self, subscriber_id: str) -> AsyncIterator[bytes]:
        """Read this subscriber's trunk until it ends or, with a RayError, breaks."""
        messages = self._actor.subscribe.options(num_returns="streaming").remote(subscriber_id)
        try:
            while True:
                # As `async for` does, but that waits for each object twice.
                (ref,) = messages._get_next_ref_n(1)
                try:
                    message = await ref
                except ObjectRefStreamEndOfStreamError:
                    return
                messages._consume_next_ref_n(1)
                yield message
        finally:
            ray.cancel(messages)

    def submit(self, batch: bytes) -> Awaitable[None]:
        """Send an encoded list of `Submission`s at once; what is returned raises if the engine did
        not take it."""
        taken: Awaitable[None] = self._actor.submit.remote(batch)
        return taken

    def acknowledge(self, subscriber_id: str, count: int) -> None:
        """Tell that so many more messages have been read; returns at once."""
        self._actor.acknowledge.remote(subscriber_id, count)

    def abort(self, request_ids: list[str]) -> None:
        """Ask for the end of requests; returns at once."""
        self._actor.abort.remote(request_ids)
