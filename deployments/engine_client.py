"""What the ingress's routes call to run requests on a model's engines."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from deployments.load_table import LoadTable
from deployments.mailbox import Mailbox
from deployments.routing import Booking
from deployments.trunk import TrunkHub
from deployments.wire import Submission, encode
from engine.errors import EngineDead
from engine.outputs import TokenDelta
from engine.request import EngineRequest

LATE_TOKENS_S = 10.0
"""After Serve says that a request ended, its last tokens may take this long to come."""


@dataclass(slots=True)
class Flight:
    """A request under way: what to resubmit if its engine is lost, and its open Serve call."""

    request: EngineRequest
    """Its `output_token_ids` hold what has come so far."""
    call: Any
    watcher: asyncio.Task[None]


class EngineClient:
    """Runs requests on one engine deployment.

    Args:
        handle: Serve handle of the deployment.
        hub: reads the trunks.
        table: where the router books.
    """

    def __init__(self, handle: Any, hub: TrunkHub, table: LoadTable) -> None:
        self.deployment = str(handle.deployment_name)
        self.handle = handle
        self.hub = hub
        self.table = table
        self.num_running = 0
        """Requests of this process that have not ended."""

    def start(self, requests: Iterable[EngineRequest]) -> Generation:
        """Send requests off; to be used as a context manager, whose end aborts what still runs."""
        return Generation(self, requests)


class Generation:
    """Requests that are consumed together, such as the `n` completions of a prompt."""

    def __init__(self, client: EngineClient, requests: Iterable[EngineRequest]) -> None:
        self._client = client
        self._mailbox = Mailbox()
        self._flights: dict[str, Flight] = {}
        subscriber_id = client.hub.subscriber_id
        # All are encoded before any is sent: what cannot be encoded must not leave others running.
        encoded = [(request, encode(Submission(subscriber_id, request))) for request in requests]
        try:
            for request, submission in encoded:
                self._launch(request, submission)
        except BaseException:
            self.abort(list(self._flights))  # nobody gets to the end of this `with`
            raise

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort(list(self._flights))

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> list[TokenDelta]:
        """What is new of any of the requests, until all have ended.

        Deltas of one request are merged while the caller is slow.

        Raises:
            EngineDead: an engine was lost with a request unfinished.
            BackPressureError: Serve's queue is full.
        """
        while self._flights:
            deltas = [d for d in await self._mailbox.take() if d.request_id in self._flights]
            for delta in deltas:
                self._flights[delta.request_id].request.output_token_ids += delta.token_ids
                if delta.finish_reason is not None:
                    self._land(delta.request_id)
            if deltas:
                return deltas
        raise StopAsyncIteration

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests now; nothing more comes of them."""
        ids = [i for i in request_ids if i in self._flights]
        self._client.hub.abort(ids)
        for request_id in ids:
            # Serve is told as well, in case the request has not reached an engine yet.
            self._flights[request_id].watcher.cancel()
            self._flights[request_id].call.cancel()
            self._land(request_id)

    def _launch(self, request: EngineRequest, submission: bytes) -> None:
        client, request_id = self._client, request.request_id
        call = client.handle.generate.remote(
            submission, Booking(request_id, len(request.prompt_token_ids))
        )
        # Tokens arrive in this event loop, so none can have come before the mailbox is known.
        watcher = asyncio.create_task(self._watch(call, request_id))
        self._flights[request_id] = Flight(request, call, watcher)
        client.hub.register(request_id, self._mailbox)
        client.num_running += 1

    def _land(self, request_id: str) -> None:
        del self._flights[request_id]
        self._client.num_running -= 1
        self._client.hub.unregister(request_id)
        self._client.table.release(request_id)

    async def _watch(self, call: Any, request_id: str) -> None:
        """See to it that a request whose Serve call has ended ends for the client too."""
        error: Exception = EngineDead("the end of the output was lost; try again.")
        try:
            await call
            if request_id in self._flights:
                await asyncio.sleep(LATE_TOKENS_S)
        except Exception as failure:
            error = failure
        if request_id in self._flights:
            self._mailbox.fail(error)
