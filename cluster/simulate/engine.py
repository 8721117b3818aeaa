"""An engine in simulated time: continuous batching, chunked prefill and a prefix cache."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from cluster.simulate.block_cache import BlockCache
from cluster.simulate.chats import Request
from cluster.simulate.events import Events
from cluster.simulate.step_time import StepTime
from cluster.simulate.tally import EngineTally, Histogram
from deployments.load_meter import LoadMeter
from engine.outputs import EngineLoad

HEADROOM = 0.02
"""Share of the blocks that an admission leaves to those that run, as in the engine's planner."""


@dataclass(frozen=True, slots=True)
class EngineShape:
    """An engine's limits and pace."""

    step_time: StepTime
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 16384
    cache_tokens: int = 2**20
    block_size: int = 128
    """The real one may be smaller; a fraction of a block is then found that is missed here."""
    steps_ahead: int = 1
    """Steps that are planned before the one that runs has ended: 1 with async scheduling, or 0."""


class News(NamedTuple):
    """What a stretch of steps brought; see `LoadTable.report`."""

    engine: Engine
    load: EngineLoad
    taken: list[Request]
    """Requests that the load counts and no earlier one did."""
    ended: list[Request]


class Engine:
    """Plans steps as `engine.scheduler` does, first come first served.

    Between an arrival and the next end of a prompt or an answer all steps are alike, so that they
    are one event, whose length is known in closed form.

    Args:
        name: of the engine.
        events: of the fleet.
        shape: limits and pace.
        itl: gets the times between tokens.
        on_token: called with each request that has its first token.
        on_news: called after each stretch.
    """

    def __init__(
        self,
        name: str,
        events: Events,
        shape: EngineShape,
        itl: Histogram,
        on_token: Callable[[Request], None],
        on_news: Callable[[News], None],
    ) -> None:
        self.name = name
        self.tally = EngineTally()
        self.meter: LoadMeter | None = None
        """Follows it, if somebody asks."""
        self.told_at = events.now
        """When it last told its load."""
        self._events = events
        self._shape = shape
        self._time = shape.step_time
        self._itl = itl
        self._on_token = on_token
        self._on_news = on_news
        blocks = shape.cache_tokens // shape.block_size
        self._cache = BlockCache(blocks, shape.block_size, int(blocks * HEADROOM))
        self._waiting: deque[Request] = deque()
        self._prefilling: deque[Request] = deque()
        self._ends: list[tuple[int, int, Request]] = []
        """A heap of those that decode: last step, number, request."""
        self._num_begun = 0
        self._num_received = 0
        self._received_tokens = 0
        """Of all their prompts."""
        self._context = 0
        """Tokens that those that decode will have in the cache after the next step."""
        self._to_compute = 0
        """Prompt tokens of those that wait and prefill."""
        self._prefilled = 0
        self._fresh: list[Request] = []
        """Requests that no load counts yet."""
        self._step = 0
        """First step of the stretch that runs, or next one if none does."""
        self._num_steps = 0
        """Steps of the stretch; 0 if idle."""
        self._chunks: list[tuple[Request, int]] = []
        """Prompt tokens that its only step computes, if it prefills."""
        self._began = self._seconds = 0.0
        """Of the stretch."""
        self._version = 0
        """Of the stretch's end; those of earlier versions are off."""

    @property
    def is_idle(self) -> bool:
        """Whether it has nothing to do."""
        return not self._num_steps

    def submit(self, request: Request) -> None:
        """Take a request.

        Raises:
            ValueError: it can never run.
        """
        if -(-request.num_tokens // self._cache.block_size) > self._cache.num_blocks:
            raise ValueError(
                f"a request of {request.num_tokens} tokens cannot fit into a cache of "
                f"{self._shape.cache_tokens}; raise --cache-tokens or lower --max-tokens"
            )
        request.submitted_at = self._events.now
        self._num_received += 1
        self._received_tokens += request.num_prompt
        self._fresh.append(request)
        self._to_compute += request.num_prompt
        if self.is_idle:
            request.eligible = self._step
            self._waiting.append(request)
            self._begin()
            return
        request.eligible = self._step + self._steps_done() + 1 + self._shape.steps_ahead
        if not self._waiting and self._has_row():
            self._end_before(request.eligible)
        self._waiting.append(request)

    def load(self) -> EngineLoad:
        """The load now; see `EngineLoad`."""
        cache = self._cache
        return EngineLoad(
            num_running=len(self._ends) + len(self._prefilling),
            num_waiting=len(self._waiting),
            waiting_tokens=self._to_compute,
            free_blocks=cache.num_free,
            total_blocks=cache.num_blocks,
            block_size=cache.block_size,
            num_received=self._num_received,
            prefilled_tokens=self._prefilled,
            new_requests=self._num_received,
            new_tokens=self._received_tokens,
        )

    def tell(self, ended: list[Request] | None = None) -> None:
        """Send the load, and what is new."""
        self.told_at = self._events.now
        taken, self._fresh = self._fresh, []
        load = self.load()
        if self.meter is not None:
            self.meter.follow(load, self._events.now)
        self._on_news(News(self, load, taken, ended or []))

    def _steps_done(self) -> int:
        """Steps of the stretch that have ended."""
        if self._num_steps == 1:
            return 0
        elapsed = self._events.now - self._began
        done = self._time.decoded(len(self._ends), self._context, elapsed)
        return min(done, self._num_steps - 1)

    def _has_row(self) -> bool:
        return len(self._ends) + len(self._prefilling) < self._shape.max_num_seqs

    def _end_before(self, step: int) -> None:
        """End the stretch so that its successor begins with this step, or earlier."""
        if step - self._step < self._num_steps:
            self._num_steps = step - self._step
            self._plan_end()

    def _plan_end(self) -> None:
        self._version += 1
        self._seconds = self._length()
        self._events.at(self._began + self._seconds, self._end, self._version)

    def _length(self) -> float:
        """Seconds of the stretch."""
        rows = len(self._ends)
        if not self._chunks:
            return self._time.decode(rows, self._context, self._num_steps)
        tokens = sum(count for _, count in self._chunks)
        cached = sum(request.num_prompt - request.num_missing for request, _ in self._chunks)
        context = self._context + cached + tokens
        return self._time.step(rows, context, tokens)

    def _begin(self) -> None:
        """Begin the next step, and with it those that will be like it."""
        if self._waiting:
            self._admit()
        self._chunks = self._cut_chunks() if self._prefilling else []
        self._began = self._events.now
        if self._chunks:
            self._num_steps = 1
        elif self._ends:
            self._num_steps = self._ends[0][0] - self._step + 1
            if self._waiting and self._waiting[0].eligible > self._step:
                self._num_steps = min(self._num_steps, self._waiting[0].eligible - self._step)
        else:
            self._num_steps = 0
            return
        self._plan_end()

    def _admit(self) -> None:
        """Start waiting requests while budget, rows and blocks last."""
        waiting = self._waiting
        budget = self._shape.max_num_batched_tokens - len(self._ends)
        budget -= sum(request.num_missing for request in self._prefilling)
        alone = idle = not self._ends and not self._prefilling  # no step was planned ahead
        while waiting and budget > 0 and self._has_row():
            request = waiting[0]
            if not (idle or request.eligible <= self._step):
                return
            if not self._cache.admit(request, alone):
                return
            waiting.popleft()
            alone = False
            request.num_missing = request.num_prompt - request.num_cached
            budget -= request.num_missing
            self._prefilling.append(request)
            self._to_compute -= request.num_cached
            self._prefilled += request.num_cached

    def _cut_chunks(self) -> list[tuple[Request, int]]:
        """Give the step's budget to those that prefill, in order."""
        chunks: list[tuple[Request, int]] = []
        budget = self._shape.max_num_batched_tokens - len(self._ends)
        for request in self._prefilling:
            if budget <= 0:
                break
            count = min(request.num_missing, budget)
            budget -= count
            chunks.append((request, count))
        return chunks

    def _end(self, version: int) -> None:
        """Take in the stretch, tell of it, and begin the next."""
        if version != self._version:
            return
        steps, rows, seconds = self._num_steps, len(self._ends), self._seconds
        if rows:
            self._itl.add(seconds / steps, rows * steps)
        self._step += steps
        self._context += rows * steps
        self.tally.busy_s += seconds
        ended = self._decode()
        if self._chunks:
            ended += self._prefill()
        self.tell(ended)
        self._begin()

    def _decode(self) -> list[Request]:
        """The requests whose last token has come."""
        ended, ends = [], self._ends
        while ends and ends[0][0] < self._step:
            request = heapq.heappop(ends)[2]
            self._context -= request.num_tokens
            ended.append(self._finish(request))
        return ended

    def _prefill(self) -> list[Request]:
        """Take in the chunks; returns those that their first token ends."""
        ended = []
        for request, count in self._chunks:
            request.num_missing -= count
            self._to_compute -= count
            self._prefilled += count
            if request.num_missing:
                continue
            self._prefilling.popleft()
            self._on_token(request)
            if self.meter is not None:
                now = self._events.now
                self.meter.note_first_token(now - request.submitted_at, now)
            if request.num_output == 1:
                ended.append(self._finish(request))
                continue
            self._num_begun += 1
            self._context += request.num_prompt + 1
            last = self._step + request.num_output - 2
            heapq.heappush(self._ends, (last, self._num_begun, request))
        return ended

    def _finish(self, request: Request) -> Request:
        self._cache.release(request)
        tally = self.tally
        tally.requests += 1
        tally.computed_tokens += request.num_prompt - request.num_cached
        tally.output_tokens += request.num_output
        return request
