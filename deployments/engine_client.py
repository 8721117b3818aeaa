"""What the ingress's routes call to run requests on a model's engines."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any

from deployments.failover import FailoverLimits, Flight
from deployments.journey import Journey
from deployments.load_table import LoadTable
from deployments.mailbox import Mailbox
from deployments.prefix_index import request_blocks
from deployments.trunk import TrunkHub
from engine.outputs import TokenDelta
from engine.request import EngineRequest


class EngineClient:
    """Runs requests on one engine deployment.

    Args:
        handle: Serve handle of the deployment.
        hub: reads the trunks.
        table: where the router books.
        prefix_caching: whether the engines keep what they have computed.
        failover: how far a request is carried when engines are lost.
    """

    def __init__(
        self,
        handle: Any,
        hub: TrunkHub,
        table: LoadTable,
        prefix_caching: bool = True,
        failover: FailoverLimits | None = None,
    ) -> None:
        self.deployment = str(handle.deployment_name)
        self.handle = handle
        self.hub = hub
        self.table = table
        self.prefix_caching = prefix_caching
        self.failover = failover or FailoverLimits()
        self.num_running = 0
        """Requests of this process that have not ended."""
        self._watchers: set[asyncio.Task[None]] = set()

    def start(
        self, requests: Iterable[EngineRequest], journey: Journey | None = None
    ) -> Generation:
        """Send requests off; to be used as a context manager, whose end aborts what still runs."""
        return Generation(self, requests, journey or Journey())

    def watch(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run what follows a call to its end, even when the request has no more use for it."""
        task = asyncio.ensure_future(work)
        self._watchers.add(task)  # the event loop itself would not keep it
        task.add_done_callback(self._watchers.discard)
        return task

    def mark_down(self, request_id: str) -> None:
        """Avoid the engine where the request is booked until that one reports again."""
        engine_id = self.table.engine_of(request_id)
        if engine_id is not None:
            self.table.mark_down(engine_id)

    def blocks_of(self, requests: Sequence[EngineRequest]) -> list[list[bytes]]:
        """The blocks of each request; the `n` completions of a prompt share theirs."""
        known: dict[int, list[bytes]] = {}
        for request in requests if self.prefix_caching else ():
            prompt = id(request.prompt_token_ids)
            if prompt not in known:
                known[prompt] = request_blocks(request)
        return [known.get(id(request.prompt_token_ids), []) for request in requests]


class Generation:
    """Requests that are consumed together, such as the `n` completions of a prompt."""

    def __init__(
        self, client: EngineClient, requests: Iterable[EngineRequest], journey: Journey
    ) -> None:
        self._client = client
        self._mailbox = Mailbox()
        requests = list(requests)
        # All are encoded before any is sent: what cannot be encoded must not leave others running.
        self._flights = {
            request.request_id: Flight(client, request, blocks, self._mailbox, journey)
            for request, blocks in zip(requests, client.blocks_of(requests), strict=True)
        }
        client.num_running += len(self._flights)
        try:
            for flight in self._flights.values():
                flight.launch()
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
            EngineDead: engines were lost and none could go on with a request.
            BackPressureError: Serve's queue is full.
        """
        while self._flights:
            deltas = []
            for delta in await self._mailbox.take():
                flight = self._flights.get(delta.request_id)
                if flight is None:  # it was aborted
                    continue
                deltas.append(delta)
                if delta.finish_reason is not None:
                    self._forget(delta.request_id).land()
            if deltas:
                return deltas
        raise StopAsyncIteration

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests now; nothing more comes of them."""
        for request_id in request_ids:
            if request_id in self._flights:
                self._forget(request_id).abort()

    def _forget(self, request_id: str) -> Flight:
        self._client.num_running -= 1
        return self._flights.pop(request_id)
