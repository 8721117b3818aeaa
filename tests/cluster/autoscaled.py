"""Engines as a fluid, in virtual time: each computes so many of the tokens that flow in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.autoscaling import Decision, Goals, Observation, State, decide
from deployments.load_meter import EngineUse

TICK_S = 0.5
PROMPT = 100.0
"""Tokens of a request."""


@dataclass
class Fluid:
    """One model's engines under `decide`.

    `arriving` gives tokens a second by time. An engine computes `speed` of them and has `rows`
    requests in its batch for each thousand that it computes a second.
    """

    arriving: Callable[[float], float]
    speed: float = 1000.0
    rows: float = 0.1
    start_up_s: float = 20.0
    least: int = 1
    most: int = 16
    goals: Goals = field(default_factory=lambda: Goals(downscale_delay_s=60.0))
    silent: bool = False
    now: float = 0.0
    target: int = 1
    ready: int = 1
    queue: float = 0.0
    state: State = field(default_factory=State)
    starting: list[float] = field(default_factory=list)
    """When those that start will be in service."""
    changes: list[tuple[float, int]] = field(default_factory=list)
    waits: list[tuple[float, float]] = field(default_factory=list)
    last: Decision | None = None

    def run(self, until: float) -> Fluid:
        while self.now < until:
            self._tick()
        return self

    def lose(self) -> None:
        """An engine dies, and Serve starts another."""
        self.ready -= 1
        self.starting.append(self.now + self.start_up_s)

    def _tick(self) -> None:
        self.now += TICK_S
        self.ready += sum(due <= self.now for due in self.starting)
        self.starting = [due for due in self.starting if due > self.now]
        come, able = self.arriving(self.now) * TICK_S, self.ready * self.speed * TICK_S
        had_queue = self.queue > 0
        done = min(self.queue + come, able)
        self.queue += come - done
        self.waits.append((self.now, self.queue / self.speed / max(self.ready, 1)))
        self._decide(done / TICK_S, self.speed if had_queue else 0.0)

    def _decide(self, done: float, speed: float) -> None:
        seen = self._observe(done, speed)
        self.last, self.state = decide(self.goals, self.state, seen, self.now)
        if self.last.target != self.target:
            self._resize(self.last.target)

    def _observe(self, done: float, speed: float) -> Observation:
        share = 1 / max(self.ready, 1)
        rate = self.arriving(self.now)
        use = EngineUse(
            running=done / PROMPT * share,
            waiting_tokens=self.queue * share,
            rows_used=done / 1000 * self.rows * share,
            arriving_tokens_s=rate * share,
            arriving_requests_s=rate / PROMPT * share,
            done_tokens_s=speed,
        )
        engines = [] if self.silent else [use] * self.ready
        held = 0.0 if self.ready else self.queue / PROMPT
        return Observation(self.target, self.ready, engines, held, self.least, self.most)

    def _resize(self, target: int) -> None:
        self.changes.append((self.now, target))
        missing = target - self.ready - len(self.starting)
        self.starting += [self.now + self.start_up_s] * missing
        self.target, self.ready = target, min(self.ready, target)
