"""A group of engines and the ingress replicas that route over them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count, cycle

from cluster.autoscaling import Observation
from cluster.simulate.chats import Chat, Request
from cluster.simulate.engine import Engine, EngineShape, News
from cluster.simulate.events import Events
from cluster.simulate.ingress import Ingress, Wires
from cluster.simulate.tally import Tally
from deployments.load_meter import LoadMeter
from deployments.placement import AFFINITY_MARGIN, POLICIES

HEARTBEAT_S = 1.0
"""An engine tells its load at least this often, as `deployments.engine_actor` has it."""

ChooseSize = Callable[[Observation, float], int]
"""What there is, and the time → how many engines there should be; at least 1."""


@dataclass(frozen=True, slots=True)
class Sizing:
    """A rule for the number of engines, and what it takes to follow it."""

    make: Callable[[], ChooseSize]
    """Makes the rule of a cell, which may remember what it saw."""
    least: int = 1
    most: int = 8
    interval_s: float = 1.0
    """Between two calls of the rule."""
    start_up_s: float = 30.0
    """Before an engine that is started takes requests; it costs from the beginning."""


@dataclass(frozen=True, slots=True)
class CellSettings:
    """What a cell consists of."""

    shape: EngineShape
    num_engines: int = 8
    num_ingresses: int = 1
    policy: str = "prefix_load"
    """A name in `POLICIES`."""
    wires: Wires = field(default_factory=Wires)
    sizing: Sizing | None = None
    """None keeps `num_engines`."""


class Cell:
    """Serves chats until all have ended.

    Args:
        settings: of the cell.
        chats: times at which chats begin, in order, and the chats.
        seed: of what the policies draw; they share the module `random` with all of this process.
    """

    def __init__(
        self, settings: CellSettings, chats: Iterable[tuple[float, Chat]], seed: object
    ) -> None:
        random.seed(repr(seed))
        self.tally = Tally()
        self.events = Events()
        self.engines: list[Engine] = []
        """All, those included that have left."""
        self._settings = settings
        self._chats: Iterator[tuple[float, Chat]] = iter(chats)
        self._numbers = count()
        self._num_open = 0
        """Chats that have begun and not ended, and the one that begins next."""
        policy = POLICIES[settings.policy](AFFINITY_MARGIN)
        room = 2 * settings.shape.max_num_seqs
        self.ingresses = [
            Ingress(self.events, policy, settings.wires, room)
            for _ in range(settings.num_ingresses)
        ]
        self._next_ingress = cycle(self.ingresses)
        self.sizes: list[tuple[float, int]] = []
        """When how many engines were in service."""
        self._choose = None if settings.sizing is None else settings.sizing.make()
        self._in_service: list[Engine] = []
        self._num_starting = 0
        self._join([self._start() for _ in range(settings.num_engines)])

    def run(self) -> Tally:
        """Serve all chats; returns the figures."""
        self._await_next_chat()
        self.events.at(HEARTBEAT_S, self._beat)
        if self._settings.sizing is not None:
            self.events.at(self._settings.sizing.interval_s, self._resize, self._settings.sizing)
        self.events.run()
        for engine in self._in_service:
            engine.tally.service_s += self.tally.end_s
        self.tally.engines = [engine.tally for engine in self.engines]
        return self.tally

    def _start(self) -> Engine:
        name = f"e{len(self.engines)}"
        shape, itl = self._settings.shape, self.tally.itl
        engine = Engine(name, self.events, shape, itl, self._note_token, self._spread)
        if self._choose is not None:
            engine.meter = LoadMeter(shape.max_num_seqs)
        engine.tally.service_s = -self.events.now
        self.engines.append(engine)
        return engine

    def _join(self, engines: list[Engine]) -> None:
        self._in_service += engines
        self.sizes.append((self.events.now, len(self._in_service)))
        for ingress in self.ingresses:
            ingress.set_engines(self._in_service)

    def _await_next_chat(self) -> None:
        found = next(self._chats, None)
        if found is not None:
            self._num_open += 1
            begins, chat = found
            self.events.at(begins, self._begin_chat, chat)

    def _begin_chat(self, chat: Chat) -> None:
        self._await_next_chat()
        self.events.at(self.events.now + chat.turns[0].pause_s, self._send, chat)

    def _send(self, chat: Chat) -> None:
        turn = chat.turns[chat.num_done]
        ingress = next(self._next_ingress)
        number = str(next(self._numbers))
        prompt = chat.history + turn.said
        ingress.send(Request(number, chat, prompt, turn.answered, ingress, self.events.now))

    def _note_token(self, request: Request) -> None:
        wait_s = self.events.now + self._settings.wires.from_engine_s - request.sent_at
        self.tally.ttft.add(wait_s)
        self.tally.prompt_tokens += request.num_prompt
        self.tally.cached_tokens += request.num_cached

    def _spread(self, news: News) -> None:
        for ingress in self.ingresses:
            ingress.hear(news)
        if news.ended:
            come = self.events.now + self._settings.wires.from_engine_s
            for request in news.ended:
                self._end_turn(request, come)
            self.tally.end_s = come

    def _end_turn(self, request: Request, come: float) -> None:
        """Note the last token, which the client has at the time `come`, and go on."""
        self.tally.e2e.add(come - request.sent_at)
        chat = request.chat
        chat.history = request.num_tokens
        chat.num_done += 1
        if chat.num_done < len(chat.turns):
            self.events.at(come + chat.turns[chat.num_done].pause_s, self._send, chat)
        else:
            self._num_open -= 1

    def _beat(self, _: None) -> None:
        """Have engines tell their load that had no reason to for a while."""
        for engine in self.engines:
            if self.events.now - engine.told_at >= HEARTBEAT_S:
                engine.tell()
        if self._num_open:
            self.events.at(self.events.now + HEARTBEAT_S, self._beat)

    def _resize(self, sizing: Sizing) -> None:
        """Start engines, or take those of least work out of service, as the rule says."""
        assert self._choose is not None
        wanted = max(1, self._choose(self._observe(sizing), self.events.now))
        missing = wanted - len(self._in_service) - self._num_starting
        if missing > 0:
            self._num_starting += missing
            joined = partial(self._finish_start, [self._start() for _ in range(missing)])
            self.events.at(self.events.now + sizing.start_up_s, joined)
        elif wanted < len(self._in_service):
            self._retire(len(self._in_service) - wanted)
        if self._num_open:
            self.events.at(self.events.now + sizing.interval_s, self._resize, sizing)

    def _observe(self, sizing: Sizing) -> Observation:
        ready, now = len(self._in_service), self.events.now
        return Observation(
            target=ready + self._num_starting,
            ready=ready,
            engines=[engine.meter.read(now) for engine in self._in_service if engine.meter],
            held=float(sum(ingress.num_held for ingress in self.ingresses)),
            least=sizing.least,
            most=sizing.most,
        )

    def _finish_start(self, engines: list[Engine], _: None) -> None:
        self._num_starting -= len(engines)
        self._join(engines)

    def _retire(self, number: int) -> None:
        """No new requests reach these; those that they have are finished."""
        by_work = sorted(self._in_service, key=lambda engine: engine.load().num_running)
        for engine in by_work[:number]:
            self._in_service.remove(engine)
            self.events.at(self.events.now + HEARTBEAT_S, self._stop_when_idle, engine)
        self._join([])

    def _stop_when_idle(self, engine: Engine) -> None:
        if engine.is_idle:
            engine.tally.service_s += self.events.now
        else:
            self.events.at(self.events.now + HEARTBEAT_S, self._stop_when_idle, engine)
