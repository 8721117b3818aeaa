"""What the ingress's routes call to run requests on a model's engines."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from deployments.load_table import LoadTable
from deployments.mailbox import Mailbox
from deployments.placement import Booking
from deployments.prefix_index import request_blocks
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
    blocks: Sequence[bytes]
    """Of its prompt; see `request_blocks`."""
    call: Any
    watcher: asyncio.Task[None]


class EngineClient:
    """Runs requests on one engine deployment.

    Args:
        handle: Serve handle of the deployment.
        hub: reads the trunks.
        table: where the router books.
        prefix_caching: whether the engines keep what they have computed.
    """

    def __init__(
        self, handle: Any, hub: TrunkHub, table: LoadTable, prefix_caching: bool = True
    ) -> None:
        self.deployment = str(handle.deployment_name)
        self.handle = handle
        self.hub = hub
        self.table = table
        self.prefix_caching = prefix_caching
        self.num_running = 0
        """Requests of this process that have not ended."""

    def start(self, requests: Iterable[EngineRequest]) -> Generation:
        """Send requests off; to be used as a context manager, whose end aborts what still runs."""
        return Generation(self, requests)

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

    def __init__(self, client: EngineClient, requests: Iterable[EngineRequest]) -> None:
        self._client = client
        self._mailbox = Mailbox()
        self._flights: dict[str, Flight] = {}
        requests = list(requests)
        blocks = client.blocks_of(requests)
        # All are encoded before any is sent: what cannot be encoded must not leave others running.
        submissions = [
            encode(Submission(client.hub.subscriber_id, *each))
            for each in zip(requests, blocks, strict=True)
        ]
        try:
            for each in zip(requests, blocks, submissions, strict=True):
                self._launch(*each)
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
            deltas = []
            for delta in await self._mailbox.take():
                flight = self._flights.get(delta.request_id)
                if flight is None:  # it was aborted
                    continue
                deltas.append(delta)
                flight.request.output_token_ids += delta.token_ids
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

    def _launch(self, request: EngineRequest, blocks: list[bytes], submission: bytes) -> None:
        client, request_id = self._client, request.request_id
        num_tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
        # Whoever wants log-probabilities of the prompt has all of it computed.
        hits = blocks if request.params.prompt_logprobs is None else ()
        call = client.handle.generate.remote(submission, Booking(request_id, num_tokens, hits))
        # Tokens arrive in this event loop, so none can have come before the mailbox is known.
        watcher = asyncio.create_task(self._watch(call, request_id))
        self._flights[request_id] = Flight(request, blocks, call, watcher)
        client.hub.register(request_id, self._mailbox)
        client.num_running += 1

    def _land(self, request_id: str) -> None:
        flight, client = self._flights.pop(request_id), self._client
        client.num_running -= 1
        client.hub.unregister(request_id)
        # What follows in the same chat begins with the output as well.
        begun = client.prefix_caching and flight.request.output_token_ids
        blocks = request_blocks(flight.request, flight.blocks) if begun else ()
        client.table.release(request_id, blocks)

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
