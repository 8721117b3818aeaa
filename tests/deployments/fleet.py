"""A fleet in simulated time: real schedulers and load tables around a device that only takes time.

One event queue, no Ray, no clock, no threads: the same arguments give the same run.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from deployments.load_table import LoadTable
from deployments.placement import Booking, Policy
from deployments.prefix_index import request_blocks
from engine.config import EngineConfig
from engine.kv_cache.hashing import block_hashes
from engine.request import EngineRequest, Request
from engine.sampling_params import SamplingParams
from engine.scheduler.scheduler import Scheduler
from engine.step import StepResult

BLOCK_SIZE = 16
MAX_MODEL_LEN = 8192
STEP_S = 0.008
TOKEN_S = 0.00002
"""A step takes this long a token beside `STEP_S`: about a 7B model on an H200."""
HEARTBEAT_S = 1.0
"""An engine tells its load at least this often."""
WIRE_S = 0.002
"""From ingress to engine, and back."""


class Events:
    """What happens when."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = count()

    def after(self, seconds: float, happen: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._queue, (self.now + seconds, next(self._order), happen, args))

    def run(self) -> None:
        while self._queue:
            self.now, _, happen, args = heapq.heappop(self._queue)
            happen(*args)


class Engine:
    """The real scheduler; every sampled token is the request's next scripted one."""

    def __init__(self, name: str, events: Events, cache_tokens: int) -> None:
        self.name = name
        self.subscribers: list[Ingress] = []
        self.prefilled = self.most_requests = 0
        self._events = events
        self._busy = False
        self._unreported: list[Turn] = []
        self._turns: dict[str, Turn] = {}
        self.scheduler = Scheduler(
            EngineConfig(max_num_seqs=256),
            num_blocks=cache_tokens // BLOCK_SIZE + 1,
            block_size=BLOCK_SIZE,
            max_model_len=MAX_MODEL_LEN,
            max_num_batched_tokens=2048,
            eos_token_ids=(),
        )

    def submit(self, wire: EngineRequest, turn: Turn) -> None:
        self._turns[wire.request_id] = turn
        self.scheduler.add(Request.from_wire(wire, MAX_MODEL_LEN))
        self._unreported.append(turn)
        if not self._busy:
            self._begin_step()

    def _begin_step(self) -> None:
        plan = self.scheduler.schedule()
        self._busy = bool(plan.rows)
        self.most_requests = max(self.most_requests, self.scheduler.load().num_running)
        if self._busy:
            self.prefilled += sum(n for n in plan.num_tokens if n > 1)
            taken, self._unreported = self._unreported, []
            duration = STEP_S + TOKEN_S * plan.total_tokens
            self._events.after(duration, self._end_step, plan, taken)

    def beat(self) -> None:
        """Tell the load, as an engine without work does."""
        for ingress in self.subscribers:
            ingress.table.report(self.name, self.scheduler.load())

    def _end_step(self, plan: Any, taken: list[Turn]) -> None:
        step = self.scheduler._in_flight[0]
        tokens = [self._turns[r.request_id].next_token(r) for r in step.sampled]
        deltas = self.scheduler.update(plan, StepResult(tokens))
        load = self.scheduler.load()
        for ingress in self.subscribers:
            own = [turn.wire.request_id for turn in taken if turn.ingress is ingress]
            heard = [turn.blocks for turn in taken if turn.ingress is not ingress]
            self._events.after(WIRE_S, ingress.table.report, self.name, load, own, heard)
        for delta in deltas:
            turn = self._turns[delta.request_id]
            self._events.after(WIRE_S, turn.ingress.receive, turn, delta)
        self._begin_step()


@dataclass
class Turn:
    """One request of a chat."""

    chat: Chat
    wire: EngineRequest
    output: list[int]
    ingress: Ingress
    blocks: list[bytes]
    sent_at: float
    engine: str = ""

    def next_token(self, request: Request) -> int:
        return self.output[request.num_output_tokens]


@dataclass
class Chat:
    """A script: what the user says and what the engine answers, and the pauses."""

    name: str
    start: float
    turns: list[tuple[list[int], list[int], float]]
    history: list[int] = field(default_factory=list)
    num_done: int = 0


class Ingress:
    """An ingress replica: a load table that books by the fleet's policy."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.table = LoadTable(clock=lambda: fleet.events.now)

    def send(self, turn: Turn) -> None:
        wire = turn.wire
        turn.blocks = request_blocks(wire)
        booking = Booking(wire.request_id, len(wire.prompt_token_ids), turn.blocks)
        limits = dict.fromkeys(self.fleet.engines, 1000)
        turn.engine = self.table.book(limits, booking, self.fleet.policy) or ""
        self.fleet.sent[turn.engine] += 1
        self.fleet.events.after(WIRE_S, self.fleet.engines[turn.engine].submit, wire, turn)

    def receive(self, turn: Turn, delta: Any) -> None:
        if not turn.wire.output_token_ids:
            self.fleet.ttfts.append(self.fleet.events.now - turn.sent_at)
        turn.wire.output_token_ids += delta.token_ids
        if delta.finish_reason is not None:
            self.table.release(turn.wire.request_id, request_blocks(turn.wire, turn.blocks))
            self.fleet.finish(turn)


class Fleet:
    """Engines, ingress replicas and the figures of a run."""

    def __init__(
        self,
        policy: Policy,
        num_engines: int = 4,
        num_ingresses: int = 1,
        cache_tokens: int = 16384,
        seed: int = 0,
    ) -> None:
        self.policy = policy
        self.events = Events()
        self.rng = random.Random(seed)
        names = [f"e{i}" for i in range(num_engines)]
        self.engines = {name: Engine(name, self.events, cache_tokens) for name in names}
        self.ingresses = [Ingress(self) for _ in range(num_ingresses)]
        self.sent = dict.fromkeys(names, 0)
        self.ttfts: list[float] = []
        self.infinite_hits = 0
        self._infinite: set[bytes] = set()
        self._num_open = 0
        for engine in self.engines.values():
            engine.subscribers = self.ingresses

    def run(self, chats: Sequence[Chat]) -> None:
        self._num_open = len(chats)
        for chat in chats:
            self.events.after(chat.start, self.begin_turn, chat)
        self._beat()
        self.events.run()

    def _beat(self) -> None:
        for engine in self.engines.values():
            engine.beat()
        if self._num_open:
            self.events.after(HEARTBEAT_S, self._beat)

    def begin_turn(self, chat: Chat) -> None:
        said, answer, _ = chat.turns[chat.num_done]
        prompt = chat.history + said
        self._count_infinite(prompt)
        params = SamplingParams(max_tokens=len(answer), ignore_eos=True, seed=0)
        wire = EngineRequest(f"{chat.name}-{chat.num_done}", prompt, params)
        ingress = self.rng.choice(self.ingresses)
        ingress.send(Turn(chat, wire, answer, ingress, [], self.events.now))

    def finish(self, turn: Turn) -> None:
        chat = turn.chat
        chat.history = turn.wire.prompt_token_ids + turn.output
        self._infinite.update(block_hashes(chat.history[:-1], BLOCK_SIZE))
        pause = chat.turns[chat.num_done][2]
        chat.num_done += 1
        if chat.num_done < len(chat.turns):
            self.events.after(pause, self.begin_turn, chat)
        else:
            self._num_open -= 1

    def _count_infinite(self, prompt: list[int]) -> None:
        hashes = block_hashes(prompt, BLOCK_SIZE)
        for block in hashes[: (len(prompt) - 1) // BLOCK_SIZE]:
            if block not in self._infinite:
                break
            self.infinite_hits += BLOCK_SIZE
        self._infinite.update(hashes)

    @property
    def hits(self) -> int:
        """Prompt tokens that the engines found in their caches."""
        return sum(engine.scheduler.load().prefix_hits for engine in self.engines.values())


def scripted_chats(
    number: int,
    num_turns: int,
    said: tuple[int, int],
    answered: tuple[int, int],
    pause_s: float,
    every_s: float,
    system: int = 0,
    seed: int = 0,
) -> list[Chat]:
    """Chats that begin one after another; lengths are uniform, pauses exponential.

    Args:
        number: of chats.
        num_turns: of each.
        said: shortest and longest message, in tokens.
        answered: the same of an answer.
        pause_s: mean time between an answer and the next message.
        every_s: mean time between the beginnings of chats; 0 begins all at once.
        system: tokens that all chats begin with.
        seed: of everything.
    """
    rng = random.Random(seed)

    def tokens(length: int) -> list[int]:
        return [rng.randrange(50_000) for _ in range(length)]

    shared, start, chats = tokens(system), 0.0, []
    for number_ in range(number):
        start += rng.expovariate(1 / every_s) if every_s else 0.0
        turns = [
            (
                tokens(rng.randint(*said)),
                tokens(rng.randint(*answered)),
                rng.expovariate(1 / pause_s),
            )
            for _ in range(num_turns)
        ]
        chats.append(Chat(f"c{number_}", start, turns, history=list(shared)))
    return chats
