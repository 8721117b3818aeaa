"""One request on its way to its end, whatever becomes of the engines that run it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Sequence
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc  # type: ignore[import-untyped]
import msgspec
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
)

from deployments.journey import Journey
from deployments.mailbox import Mailbox
from deployments.placement import Booking
from deployments.prefix_index import request_blocks
from deployments.wire import Submission, encode
from engine.errors import EngineDead
from engine.outputs import TokenDelta
from engine.request import EngineRequest

if TYPE_CHECKING:
    from deployments.engine_client import EngineClient

LATE_TOKENS_S = 10.0
"""After Serve says that a request ended, its last tokens may take this long to come."""
FIRST_PAUSE_S = 0.1
"""Pause before the second try in a row that brought next to nothing; it doubles with each. The
first is made at once."""
LAST_PAUSE_S = 2.0
FRUITFUL_TOKENS = 8
"""A try that brought so many has not been in vain. Fewer may come of a request that breaks engines:
one at least comes with the computation of what there was."""


@dataclass(frozen=True, slots=True)
class FailoverLimits:
    """How far a request is carried from engine to engine."""

    max_barren_tries: int = 3
    """Tries in a row that may end with fewer than `FRUITFUL_TOKENS` new tokens. A request that
    breaks engines must not break all of them."""
    timeout_s: float = 120.0
    """Longest time from the loss of an engine to the next token, waiting for a new engine
    included."""


class Flight:
    """A request under way. Belongs to one event loop.

    What comes of it goes to a mailbox, under the request's own id. When its engine is lost, or a
    step fails there, the request goes on elsewhere after the tokens that have come. Each try has an
    id of its own, so that what a lost engine may still say goes nowhere.

    Args:
        client: whose engines run it.
        request: its `output_token_ids` hold what has come so far.
        blocks: of its prompt; see `request_blocks`.
        mailbox: gets the tokens or, when no engine can go on, why not.
        journey: is told what becomes of it.

    Raises:
        TypeError: the request cannot be encoded.
    """

    def __init__(
        self,
        client: EngineClient,
        request: EngineRequest,
        blocks: Sequence[bytes],
        mailbox: Mailbox,
        journey: Journey,
    ) -> None:
        self.request = request
        self.deployment = client.deployment
        self._client = client
        self._blocks = blocks
        self._mailbox = mailbox
        self._journey = journey
        self._submission = self._encode(request)
        self._try_id = request.request_id
        self._num_tries = 1
        self._barren_tries = 0
        self._new_tokens = 0
        """Those that this try has brought."""
        self._options = ""
        """`Traits.options` of the last engine."""
        self._over = False
        self._call: Any = None
        """Serve's of this try; None between tries."""
        self._watcher: asyncio.Task[None] | None = None
        self._late_tokens: asyncio.Future[None] | None = None
        """Waited for when Serve knows of the end before the last tokens are here."""
        self._next_try: asyncio.TimerHandle | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._num_prompt_logprobs = 0
        self._known_prompt_logprobs = 0
        """Entries that this try repeats."""

    def launch(self) -> None:
        """Send the request, or what is left of it, to an engine."""
        client, request = self._client, self.request
        self._new_tokens, num_tokens = 0, self._num_tokens
        hits = () if request.computes_whole_prompt else self._blocks
        send = partial(client.hub.submit, self._try_id, self._submission)
        client.table.expect(self.deployment, self._try_id, num_tokens, send)
        client.hub.register(self._try_id, self)
        resumed = self._num_tries > 1
        booking = Booking(self._try_id, num_tokens, hits, resumed, self._options)
        if not resumed:  # else engines have to report first, which the router waits for
            client.table.book_at_once(self.deployment, booking)
        self._call_serve(booking)
        if not client.hub.connected(self.deployment):
            self.strand()

    def _call_serve(self, booking: Booking) -> None:
        """Have Serve count the request, and lead it to an engine if it has none yet."""
        # In a context of its own: Serve would cancel the call with the request that it is part of.
        self._call = Context().run(self._client.handle.generate.remote, booking)
        self._watcher = self._client.watch(self._watch(self._call, booking))

    def add(self, delta: TokenDelta, engine_id: str) -> None:
        """Take what the engine of this try tells."""
        if not self._new_tokens:
            self._journey.meet(engine_id)
        if delta.finish_reason == "error" and not delta.refused:
            self._fall(delta)
        else:
            self._take(delta)

    def lose(self) -> None:
        """Go on elsewhere, as the engine is lost."""
        self._retry_or(
            lambda: self.fail(EngineDead("the engine that ran the request was lost; try again."))
        )

    def make_way(self) -> bool:
        """Go on elsewhere if another engine could do so at once, as this one is to stop."""
        table = self._client.table
        begun = not self._over and self._call is not None
        if not begun or not table.has_space(self.deployment, self._try_id, self._num_tokens):
            return False
        self._prepare_try()
        self._try_again()
        return True

    def strand(self) -> None:
        """Wait for an engine no longer than the limit, as there is none at all."""
        if not self._over and self._expiry is None:
            limit = self._client.failover.timeout_s
            self._expiry = asyncio.get_running_loop().call_later(limit, self._expire)

    def fail(self, error: Exception) -> None:
        """End the request with an error."""
        self._over = True
        self._mailbox.fail(error)
        self._leave()

    def abort(self) -> None:
        """End the request now; nothing more comes of it."""
        self._over = True
        self._cancel_expiry()
        self._leave(self._computed_blocks())

    def land(self) -> None:
        """Tidy up after the request's end."""
        self._cancel_expiry()
        self._expect_no_tokens()
        self._client.hub.unregister(self._try_id)
        self._client.table.release(self._try_id, self._computed_blocks())

    @property
    def _is_placed(self) -> bool:
        """Whether an engine has been chosen for this try."""
        return self._client.table.engine_of(self._try_id) is not None

    @property
    def _num_tokens(self) -> int:
        """Those that must be in an engine's cache before the next one comes."""
        return len(self.request.prompt_token_ids) + len(self.request.output_token_ids)

    def _computed_blocks(self) -> Sequence[bytes]:
        """Blocks that the engine has computed for the request beyond those that were booked."""
        # What follows in the same chat begins with the output as well.
        begun = self._client.prefix_caching and self.request.output_token_ids
        return request_blocks(self.request, self._blocks) if begun else ()

    def _take(self, delta: TokenDelta) -> None:
        self._new_tokens += len(delta.token_ids)
        if self._new_tokens >= FRUITFUL_TOKENS:
            self._barren_tries = 0
        self._cancel_expiry()
        if self._num_tries > 1 and self.request.output_token_ids:
            delta.num_cached_tokens = delta.queued_s = delta.prefill_s = 0  # told already
        self.request.output_token_ids += delta.token_ids
        self._count_prompt_logprobs(delta)
        self._deliver(delta)

    def _fall(self, delta: TokenDelta) -> None:
        """Go on elsewhere, as a step failed; tokens of steps before it may be in the delta."""
        if delta.token_ids or delta.prompt_logprobs:
            self._take(msgspec.structs.replace(delta, finish_reason=None, error=None))
        # Should the engine itself be broken, it seems to be the idlest of all.
        self._client.mark_down(self._try_id)
        end = TokenDelta(delta.request_id, [], finish_reason="error", error=delta.error)
        self._retry_or(lambda: self._deliver(end))

    def _deliver(self, delta: TokenDelta) -> None:
        self._over = self._over or delta.finish_reason is not None
        delta.request_id = self.request.request_id
        self._mailbox.add(delta)

    def _expire(self) -> None:
        self._expiry = None
        hub = self._client.hub
        has_engine = hub.connected(self.deployment) or hub.reaches(self._try_id)
        waits_in_line = self._num_tries == 1 and has_engine
        if not self._over and not waits_in_line:
            self.fail(EngineDead("no engine could go on with the request; try again."))

    def _retry_or(self, give_up: Callable[[], None]) -> None:
        """Plan the next try, unless there have been too many in vain."""
        if self._over or self._next_try is not None:
            return
        self._barren_tries += 1
        if self._barren_tries > self._client.failover.max_barren_tries:
            self._leave()
            self._cancel_expiry()
            give_up()
            return
        self._plan_try(0.0 if self._barren_tries == 1 else _pause_s(self._barren_tries))

    def _plan_try(self, pause_s: float) -> None:
        self._prepare_try()
        self.strand()
        self._journey.moved_at.append(time.monotonic())
        self._next_try = asyncio.get_running_loop().call_later(pause_s, self._try_again)

    def _prepare_try(self) -> None:
        """Part from the engine, and get ready for another."""
        self._options = self._client.table.options_of(self._try_id) or self._options
        self._leave()
        self._num_tries += 1
        self._try_id = f"{self.request.request_id}~{self._num_tries}"
        self._submission = self._encode(self._rest())

    def _try_again(self) -> None:
        self._next_try = None
        try:
            self.launch()
        except Exception as error:
            self.fail(error)

    def _encode(self, request: EngineRequest) -> bytes:
        subscriber_id, origin = self._client.hub.subscriber_id, self._journey.request_id
        return encode(Submission(subscriber_id, request, list(self._blocks), origin))

    def _rest(self) -> EngineRequest:
        """What is left of the request."""
        request, params = self.request, self.request.params
        self._known_prompt_logprobs = self._num_prompt_logprobs
        if params.prompt_logprobs is not None and request.output_token_ids:
            params = msgspec.structs.replace(params, prompt_logprobs=None)  # all have come
        return msgspec.structs.replace(
            request, request_id=self._try_id, params=params, resumed=True
        )

    def _count_prompt_logprobs(self, delta: TokenDelta) -> None:
        """Drop those that an earlier try has brought already."""
        if not delta.prompt_logprobs:
            return
        known = min(self._known_prompt_logprobs, len(delta.prompt_logprobs))
        self._known_prompt_logprobs -= known
        delta.prompt_logprobs = delta.prompt_logprobs[known:]
        self._num_prompt_logprobs += len(delta.prompt_logprobs)

    def _leave(self, blocks: Sequence[bytes] = ()) -> None:
        """Part from the engine, which may live on and should not go on."""
        client = self._client
        if self._next_try is not None:
            self._next_try.cancel()
            self._next_try = None
        told = client.hub.abort(self._try_id)
        client.hub.unregister(self._try_id)
        if self._call is not None and self._watcher is not None and not told:
            # It stands in line, or where it runs cannot be reached. Else the replica ends the call
            # with the request, or when it finds the request missing at the engine: a call over gRPC
            # that is cancelled leaves a kilobyte behind for ever.
            self._watcher.cancel()
            with contextlib.suppress(Exception):  # a call that has failed says so again
                self._call.cancel()
        self._call = None
        self._expect_no_tokens()
        client.table.release(self._try_id, blocks)

    def _expect_no_tokens(self) -> None:
        if self._late_tokens is not None:
            self._late_tokens.cancel()

    def _cancel_expiry(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None

    async def _watch(self, call: Any, booking: Booking) -> None:
        """See to it that a request whose Serve call has ended does not wait for ever."""
        error: Exception = EngineDead("the end of the output was lost; try again.")
        try:
            reason = await call
            still_mine = not self._over and call is self._call
            if still_mine and reason != "abort":  # nobody here has asked for that
                self._late_tokens = asyncio.get_running_loop().create_future()
                await asyncio.wait((self._late_tokens,), timeout=LATE_TOKENS_S)
        except Exception as failure:
            error = failure
        if self._over or call is not self._call:
            return  # to be cancelled looks like a loss
        if _is_loss(error):
            self._client.mark_down(self._try_id)
            self.lose()
        elif isinstance(error, BackPressureError) and self._is_placed:
            # Serve's queue is full of others, but this one is at its engine: only its count fails.
            await asyncio.sleep(_pause_s(2))
            if not self._over and call is self._call:
                self._call_serve(booking)
        elif isinstance(error, BackPressureError) and self._num_tries > 1:
            self._plan_try(_pause_s(self._num_tries))  # it was admitted once: no reason to give up
        else:
            self.fail(error)


def _pause_s(number: int) -> float:
    """A pause that varies, so that those who were lost together do not come back together."""
    return min(FIRST_PAUSE_S * 2.0 ** min(number - 2, 10), LAST_PAUSE_S) * random.uniform(0.5, 1.0)


def _is_loss(error: Exception) -> bool:
    """Whether the engine, its replica or its node is gone, rather than the request wrong."""
    if isinstance(error, EngineDead | grpc.RpcError):
        return True
    own = isinstance(error, RayTaskError | BackPressureError | DeploymentUnavailableError)
    return isinstance(error, RayError | RayServeException) and not own
