"""An ingress replica in simulated time: a real load table that hears of engines a moment late."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.simulate.chats import Request
from cluster.simulate.engine import Engine, News
from cluster.simulate.events import Events
from deployments.load_table import LoadTable
from deployments.placement import Booking, Policy
from deployments.prefix_index import ROUTING_BLOCK

DEPLOYMENT = "simulated"


@dataclass(frozen=True, slots=True)
class Wires:
    """How long it takes from a client through an ingress to an engine, and back."""

    to_engine_s: float = 0.003
    from_engine_s: float = 0.003


class Ingress:
    """Books requests by a policy and follows the engines' news.

    News wait unread until the table is asked something; then each is taken in at the time at which
    it came, so that the table is as it would have been.

    Args:
        events: of the fleet.
        policy: of its router.
        wires: delays.
        max_requests: most that an engine holds, running and waiting.
    """

    def __init__(self, events: Events, policy: Policy, wires: Wires, max_requests: int) -> None:
        self._events = events
        self._policy = policy
        self._wires = wires
        self._max_requests = max_requests
        self._now = events.now
        self.table = LoadTable(clock=lambda: self._now)
        self._engines: dict[str, Engine] = {}
        self._limits: dict[str, int] = {}
        self._unread: deque[tuple[float, News]] = deque()
        self._line: deque[Request] = deque()
        """Requests for which no engine had room."""
        self._is_looking = False

    @property
    def num_held(self) -> int:
        """Requests for which no engine has room."""
        return len(self._line)

    def set_engines(self, engines: Iterable[Engine]) -> None:
        """Take over which engines are in service; new ones tell their load at once, as the first
        message of a trunk does."""
        known, self._engines = self._engines, {engine.name: engine for engine in engines}
        self._catch_up()
        for name, engine in self._engines.items():
            if name not in known:
                self.table.report(name, engine.load())
        self._limits = dict.fromkeys(self._engines, self._max_requests)
        self.table.set_members(DEPLOYMENT, self._engines)

    def send(self, request: Request) -> None:
        """Place a request as soon as an engine has room, after those that wait already."""
        self._line.append(request)
        self._place()

    def hear(self, news: News) -> None:
        """Receive what an engine sends now."""
        self._unread.append((self._events.now + self._wires.from_engine_s, news))
        if self._line:
            self._look_later()

    def _place(self) -> None:
        self._catch_up()
        while self._line:
            request = self._line[0]
            prompt = request.num_prompt
            blocks = request.chat.blocks(ROUTING_BLOCK, prompt)
            booking = Booking(request.request_id, prompt, blocks)
            chosen = self.table.book(self._limits, booking, self._policy)
            if chosen is None:
                self._look_later()
                return
            self._line.popleft()
            arrival = self._events.now + self._wires.to_engine_s
            self._events.at(arrival, self._engines[chosen].submit, request)

    def _look_later(self) -> None:
        """Try again when the next news is there."""
        if self._unread and not self._is_looking:
            self._is_looking = True
            self._events.at(self._unread[0][0], self._look)

    def _look(self, _: None) -> None:
        self._is_looking = False
        self._place()

    def _catch_up(self) -> None:
        """Let the table know of what has come so far."""
        unread, table, now = self._unread, self.table, self._events.now
        while unread and unread[0][0] <= now:
            self._now, news = unread.popleft()
            own: list[str] = []
            heard: list[list[bytes]] = []
            for request in news.taken:
                if request.ingress is self:
                    own.append(request.request_id)
                else:
                    heard.append(request.chat.blocks(ROUTING_BLOCK, request.num_prompt))
            table.report(news.engine.name, news.load, own, heard)
            for request in news.ended:
                if request.ingress is self:
                    blocks = request.chat.blocks(ROUTING_BLOCK, request.num_tokens)
                    table.release(request.request_id, blocks)
        self._now = now
