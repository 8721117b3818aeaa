"""What this process knows of the load of every engine, with its own bookings on top.

The ingress's thread books and reports, the router's books too; hence the lock. A module of its own
because Ray Serve copies router modules by value, and there must be one table a process.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from deployments.backlog import Backlog
from deployments.engine_state import EngineState, Traits
from deployments.placement import Booking, Policy, PrefixLoad
from deployments.roll_call import RollCall
from deployments.unplaced import Unplaced, UnplacedRequests
from engine.errors import EngineDead
from engine.outputs import EngineLoad

DEFAULT_POLICY = PrefixLoad()
REPORT_DUE_S = 1.0
"""An engine that lives reports at least this often."""
RELEASED_KEPT = 4096
"""So many requests that have ended are remembered: the router's thread may still be about to book
one, and nobody would ever release that booking."""


@dataclass(slots=True, frozen=True)
class EngineView:
    """A row for `/health`."""

    engine_id: str
    load: EngineLoad
    num_booked: int
    age_s: float | None
    estimated_wait_s: float
    """Likely wait of a new request for its first token."""


class LoadTable:
    """Load by engine, grouped by deployment. Thread-safe.

    Args:
        clock: seconds, never going back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._engines: dict[str, EngineState] = {}
        self._members: dict[str, tuple[str, ...]] = {}
        self._rules: dict[str, tuple[Mapping[str, int], Policy]] = {}
        """By deployment, with which limits and policy its router books."""
        self._placed: dict[str, str] = {}
        self._unplaced = UnplacedRequests()
        self._released: OrderedDict[str, None] = OrderedDict()
        self._bookings_made = 0
        self._attended = 0.0
        """`_attention` at the time of the last report."""
        self._last_report = clock()
        self._listeners: list[Callable[[], None]] = []
        self._room_listeners: list[Callable[[], None]] = []
        self._doubt_listeners: list[Callable[[], None]] = []
        self._full = False
        self._roll_call = RollCall()

    def set_members(
        self,
        deployment: str,
        engine_ids: Iterable[str],
        traits: Mapping[str, Traits] | None = None,
    ) -> None:
        """Take over from Serve which engines of a deployment are in service, and what they are."""
        with self._lock:
            self._members[deployment] = tuple(engine_ids)
            current = self._in_service()
            for gone in self._engines.keys() - current:
                if gone not in self._placed.values():
                    del self._engines[gone]
            for engine_id in current:
                self._state(engine_id)
            for engine_id, known in (traits or {}).items():
                self._state(engine_id).traits = known
            listeners = list(self._listeners)
        for listener in listeners:
            listener()
        self._tell_of_room()

    def set_rules(self, deployment: str, limits: Mapping[str, int], policy: Policy) -> None:
        """Take over with which limits and policy the router of a deployment books."""
        with self._lock:
            self._rules[deployment] = limits, policy

    def members(self, deployment: str) -> tuple[str, ...]:
        """Engines of the deployment that are in service."""
        with self._lock:
            return self._members.get(deployment, ())

    def on_change(self, listener: Callable[[], None]) -> None:
        """Have `listener` called, in whatever thread, after the members of a deployment change."""
        with self._lock:
            self._listeners.append(listener)

    def on_room(self, listener: Callable[[], None]) -> None:
        """Have `listener` called, in whatever thread, when `book` may succeed that did not."""
        with self._lock:
            self._room_listeners.append(listener)

    def on_doubt(self, listener: Callable[[], None]) -> None:
        """Have `listener` called, in whatever thread, when a request waits for a sign of life."""
        with self._lock:
            self._doubt_listeners.append(listener)

    def book(
        self, limits: Mapping[str, int], booking: Booking, policy: Policy = DEFAULT_POLICY
    ) -> str | None:
        """Choose an engine with room and book the request there, in one step.

        What has begun elsewhere goes only to an engine that has reported since, see `RollCall`, and
        to one with the same options while there are any.

        Args:
            limits: engine id → most requests that it holds, running and waiting.
            booking: of a request that is booked nowhere yet.
            policy: chooses among those with room.

        Returns:
            The engine, or None when none has room; `on_room` tells when to try again.

        Raises:
            EngineDead: the request was released; it would run for nobody.
        """
        with self._lock:
            chosen, tell = self._try_booking(limits, booking, policy)
        tell()
        return chosen

    def book_at_once(self, deployment: str, booking: Booking) -> str | None:
        """`book` for the router, which is only asked later, unless others wait for room.

        Returns:
            The engine, or None when the router is to book.
        """
        with self._lock:
            limits, policy = self._rules.get(deployment, ({}, DEFAULT_POLICY))
            in_service = self._members.get(deployment, ())
            limits = {i: limit for i, limit in limits.items() if i in in_service}
            if not limits or self._unplaced.has_others(deployment, booking.request_id):
                return None
            chosen, tell = self._try_booking(limits, booking, policy)
        tell()
        return chosen

    def _try_booking(
        self, limits: Mapping[str, int], booking: Booking, policy: Policy
    ) -> tuple[str | None, Callable[[], None]]:
        """See `book`; also returns what is to be called once the lock is free."""
        if booking.request_id in self._released:
            raise EngineDead("the request has ended.")
        chosen = self._book(limits, booking, policy)
        listeners = list(self._doubt_listeners) if booking.resumed and chosen is None else []
        waited = None if chosen is None else self._unplaced.pop(booking.request_id)

        def tell() -> None:
            for listener in listeners:
                listener()
            if chosen is not None and waited is not None:
                waited.on_place(chosen)

        return chosen, tell

    def _book(self, limits: Mapping[str, int], booking: Booking, policy: Policy) -> str | None:
        request_id, now = booking.request_id, self._clock()
        states = {i: self._state(i) for i in limits}
        attended = self._attention(now)
        reached = {i: state for i, state in states.items() if state.in_reach(attended)}
        if booking.resumed:
            alike = {i: s for i, s in reached.items() if s.traits.options == booking.options}
            reached = alike or reached
        roomy = {i: state for i, state in reached.items() if state.has_room(limits[i])}
        self._full |= not roomy
        if booking.resumed:
            roomy = self._roll_call.present(roomy, request_id, now)
            roomy = {i: state for i, state in roomy.items() if state.has_row()} or roomy
        if not roomy:
            return None
        chosen, num_tokens = policy.choose(reached, roomy, booking, now)
        self._bookings_made += 1
        state = states[chosen]
        state.last_booking = self._bookings_made
        state.book(request_id, num_tokens, booking.blocks, now)
        self._placed[request_id] = chosen
        return chosen

    def expect(
        self,
        deployment: str,
        request_id: str,
        num_tokens: int,
        on_place: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Count a request with so many tokens to compute until an engine is chosen for it.

        `on_place` is called with that engine, in the thread that books.
        """
        with self._lock:
            self._unplaced.add(request_id, Unplaced(deployment, num_tokens, on_place))
            self._roll_call.begin(request_id, self._clock())

    def num_held(self, deployment: str) -> int:
        """Requests for which no engine has been chosen yet."""
        with self._lock:
            return len(self._unplaced.tokens(deployment))

    def backlog(self, deployment: str) -> Backlog:
        """What stands before a new request, on the engine that would come to it first."""
        with self._lock:
            states = [self._state(i) for i in self._members.get(deployment, ())]
            attended = self._attention(self._clock())
            alive = [state for state in states if state.in_reach(attended)]
            if not alive:
                return Backlog()
            share = sum(self._unplaced.tokens(deployment)) / len(alive)
            waiting = [(state, state.pending_tokens + share) for state in alive]
            found = [Backlog(tokens, each.speed.seconds_for(tokens)) for each, tokens in waiting]
            return min(found, key=lambda backlog: (backlog.wait_s, backlog.tokens))

    def left_behind(self) -> list[str]:
        """Requests on engines that are out of service, and not known to be lost."""
        with self._lock:
            current = self._in_service()
            leaving = {i for i, state in self._engines.items() if not state.down} - current
            return [i for i, engine_id in self._placed.items() if engine_id in leaving]

    def has_space(self, deployment: str, request_id: str, num_tokens: int) -> bool:
        """Whether a request that runs could go on elsewhere, with next to no wait for its turn.

        All engines in service must be like the one that has it. Else there is an update under way,
        which stops those that are before long.
        """
        with self._lock:
            now = self._clock()
            own = self._engines.get(self._placed.get(request_id, ""))
            others = [self._state(i) for i in self._members.get(deployment, ())]
            if own is None or any(state.traits.options != own.traits.options for state in others):
                return False
            before = self._unplaced.tokens(deployment)
            return any(
                state.in_reach(self._attention(now))
                and state.has_space(num_tokens, len(before), sum(before))
                for state in others
            )

    def is_wanted(self, request_id: str) -> bool:
        """Whether the request is booked, or waits to be."""
        with self._lock:
            return request_id in self._placed or self._unplaced.counts(request_id)

    def engine_of(self, request_id: str) -> str | None:
        """Where the request is booked."""
        with self._lock:
            return self._placed.get(request_id)

    def options_of(self, request_id: str) -> str:
        """`Traits.options` of the engine where the request is booked; empty if it is nowhere."""
        with self._lock:
            engine = self._engines.get(self._placed.get(request_id, ""))
            return "" if engine is None else engine.traits.options

    def mark_down(self, engine_id: str) -> list[str]:
        """Avoid an engine that is lost until it reports again; returns the requests booked on it.

        Serve takes a moment to notice, and a dead engine would seem to be the idlest of all.
        """
        with self._lock:
            self._roll_call.hear(engine_id)
            if engine_id in self._engines:
                self._engines[engine_id].down = True
            return [i for i, engine in self._placed.items() if engine == engine_id]

    def report(
        self,
        engine_id: str,
        load: EngineLoad,
        reflected: Iterable[str] = (),
        heard: Iterable[Sequence[bytes]] = (),
    ) -> None:
        """Take over what an engine tells.

        Args:
            engine_id: of the engine.
            load: fresh.
            reflected: requests whose bookings are part of the load now.
            heard: blocks of requests that others sent there.
        """
        with self._lock:
            now = self._clock()
            self._attended, self._last_report = self._attention(now), now
            state = self._state(engine_id)
            state.report(load, reflected, heard, now)
            state.heard_at = self._attended
            self._full |= self._roll_call.hear(engine_id)
        self._tell_of_room()

    def release(self, request_id: str, blocks: Sequence[bytes] = ()) -> None:
        """Forget a request that has ended; its id must not be used again.

        Args:
            request_id: of the request.
            blocks: what its engine has computed for it; see `request_blocks`.
        """
        with self._lock:
            self._unplaced.pop(request_id)
            self._roll_call.end(request_id)
            state = self._drop(request_id)
            if state is not None:
                state.index.use(blocks)
            self._released[request_id] = None
            if len(self._released) > RELEASED_KEPT:
                self._released.popitem(last=False)
        self._tell_of_room()

    def forget(self, engine_id: str) -> None:
        """Drop a lost engine: its load, and the bookings on it."""
        with self._lock:
            self._engines.pop(engine_id, None)
            for request_id in [i for i, e in self._placed.items() if e == engine_id]:
                del self._placed[request_id]

    def view(self, deployment: str) -> list[EngineView]:
        """The engines in service, for people and tests to look at."""
        now = self._clock()
        with self._lock:
            return [
                EngineView(
                    engine_id=engine_id,
                    load=(state := self._engines[engine_id]).load,
                    num_booked=len(state.bookings),
                    estimated_wait_s=state.speed.seconds_for(state.pending_tokens),
                    age_s=None if state.reported_at is None else now - state.reported_at,
                )
                for engine_id in self._members.get(deployment, ())
                if engine_id in self._engines
            ]

    def _attention(self, now: float) -> float:
        """Seconds for which this process has listened to engines, up to a time.

        When nobody reports, it is this process that is held up, or it has been without engines:
        that is no silence of theirs, so such a time counts for one interval at most.
        """
        return self._attended + min(now - self._last_report, REPORT_DUE_S)

    def _tell_of_room(self) -> None:
        with self._lock:
            listeners = list(self._room_listeners) if self._full else []
            self._full = False
        for listener in listeners:
            listener()

    def _in_service(self) -> set[str]:
        return {i for ids in self._members.values() for i in ids}

    def _state(self, engine_id: str) -> EngineState:
        if engine_id not in self._engines:
            self._engines[engine_id] = EngineState()
        return self._engines[engine_id]

    def _drop(self, request_id: str) -> EngineState | None:
        """Undo a booking; returns the engine where it was."""
        state = self._engines.get(self._placed.pop(request_id, ""))
        if state is not None:
            state.unbook(request_id)
        return state


@functools.cache
def load_table() -> LoadTable:
    """The table of this process."""
    return LoadTable()
