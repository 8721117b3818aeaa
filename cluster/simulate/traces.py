"""Traffic: when chats begin, how they go on, and how long everything is."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from cluster.simulate.chats import Chat, Turn


class Arrivals(Protocol):
    """A way for chats to arrive."""

    def times(self, rate: float, shared: random.Random, own: random.Random) -> Iterator[float]:
        """Seconds after the start, ascending, without end.

        Args:
            rate: mean arrivals a second at this cell.
            shared: gives every cell the same draws.
            own: this cell's.
        """


class Poisson:
    """One by one, at a steady rate."""

    def times(self, rate: float, shared: random.Random, own: random.Random) -> Iterator[float]:
        """See `Arrivals.times`."""
        now = 0.0
        while True:
            now += own.expovariate(rate)
            yield now


@dataclass(frozen=True)
class Bursts:
    """In bursts that all cells feel at the same time; in between, Poisson."""

    every_s: float = 20.0
    """Mean time between two bursts."""
    share: float = 0.5
    """Of all chats."""
    lasts_s: float = 0.5
    """A burst's chats arrive within this time."""

    def times(self, rate: float, shared: random.Random, own: random.Random) -> Iterator[float]:
        """See `Arrivals.times`."""
        size = self.share * rate * self.every_s
        begin = now = 0.0
        while True:
            end = begin + shared.expovariate(1 / self.every_s)
            while (now := now + own.expovariate(rate * (1 - self.share))) < end:
                yield now
            for after in sorted(own.uniform(0, self.lasts_s) for _ in range(_poisson(own, size))):
                yield end + after
            begin = now = end + self.lasts_s


@dataclass(frozen=True)
class Day:
    """Poisson with a rate that follows a sine."""

    length_s: float = 600.0
    """Of a day, which is short so that a run has several."""
    swing: float = 0.8
    """Largest deviation from the mean, as a share of it."""

    def times(self, rate: float, shared: random.Random, own: random.Random) -> Iterator[float]:
        """See `Arrivals.times`."""
        return _thinned(rate, self.level, 1 + self.swing, own)

    def level(self, now: float) -> float:
        """Rate at a time, over its mean."""
        return 1 - self.swing * math.cos(2 * math.pi * now / self.length_s)


@dataclass(frozen=True)
class Steps:
    """Poisson with a rate that jumps up, and down again, over and over."""

    low_s: float = 300.0
    high_s: float = 300.0
    times_low: float = 8.0
    """The high rate over the low one."""

    def times(self, rate: float, shared: random.Random, own: random.Random) -> Iterator[float]:
        """See `Arrivals.times`."""
        return _thinned(rate, self.level, self.times_low * self._low, own)

    def level(self, now: float) -> float:
        """Rate at a time, over its mean."""
        is_low = now % (self.low_s + self.high_s) < self.low_s
        return self._low if is_low else self.times_low * self._low

    @property
    def _low(self) -> float:
        return (self.low_s + self.high_s) / (self.low_s + self.times_low * self.high_s)


@dataclass(frozen=True)
class Lengths:
    """Log-normal numbers of tokens."""

    median: int
    sigma: float
    """Of the logarithm: 0.5 is mild, 1.2 heavy-tailed."""
    most: int
    """Larger draws are cut to this."""

    def draw(self, rng: random.Random) -> int:
        """At least 1."""
        drawn = int(rng.lognormvariate(math.log(self.median), self.sigma))
        return max(1, min(drawn, self.most))


@dataclass(frozen=True)
class Trace:
    """A kind of traffic."""

    arrivals: Arrivals
    said: Lengths
    """Of what a user says in a turn."""
    answered: Lengths
    """Of an answer."""
    mean_turns: float = 1.0
    """Of a chat; their number is geometric."""
    think_s: float = 0.0
    """Mean of the exponential pause before each turn but the first."""
    prefixes: int = 0
    """Different texts that chats begin with; 0 for none. The n-th is drawn 1 / n as often as the
    first (Zipf)."""
    prefix_tokens: int = 0
    """Length of each."""

    def chats(
        self, cell: int, requests: int, rate: float, seed: int, max_tokens: int
    ) -> Iterator[tuple[float, Chat]]:
        """Chats of one cell with the times at which they begin, the same for the same arguments.

        Args:
            cell: number of the cell.
            requests: of all chats together; the last one is cut short.
            rate: mean requests a second at this cell, if none had to wait.
            seed: of the fleet.
            max_tokens: a chat ends before it is longer.
        """
        own, shared = random.Random(f"{seed}/{cell}"), random.Random(f"{seed}/shared")
        weights = [1 / n for n in range(1, self.prefixes + 1)]
        names = [b"p%d/" % n for n in range(self.prefixes)]
        times, left, number = self.arrivals.times(rate / self.mean_turns, shared, own), requests, 0
        while left:
            turns = self._draw_turns(own, left, max_tokens)
            left -= len(turns)
            prefix = own.choices(names, weights)[0] if names else b""
            yield next(times), Chat(b"c%d/" % number, turns, prefix, self.prefix_tokens)
            number += 1

    def _draw_turns(self, rng: random.Random, most: int, max_tokens: int) -> list[Turn]:
        turns: list[Turn] = []
        length = self.prefix_tokens
        while len(turns) < most and (not turns or rng.random() >= 1 / self.mean_turns):
            said, answered = self.said.draw(rng), self.answered.draw(rng)
            length += said + answered
            if turns and length > max_tokens:
                break
            pause_s = rng.expovariate(1 / self.think_s) if turns and self.think_s else 0.0
            turns.append(Turn(pause_s, said, answered))
        return turns


TRACES = {
    "poisson": Trace(Poisson(), Lengths(300, 0.5, 4096), Lengths(100, 0.5, 1024)),
    "bursts": Trace(Bursts(), Lengths(300, 0.5, 4096), Lengths(100, 0.5, 1024)),
    "day": Trace(Day(), Lengths(300, 0.5, 4096), Lengths(100, 0.5, 1024)),
    "chats": Trace(
        Poisson(), Lengths(120, 0.6, 4096), Lengths(100, 0.5, 1024), 6.0, 10.0, 64, 1024
    ),
    "heavy": Trace(Poisson(), Lengths(300, 1.4, 32768), Lengths(80, 1.2, 4096)),
}
"""Name → traffic. Prompts and answers are of the order of public chat traces; nothing here was
fitted to one."""


def _thinned(
    rate: float, level: Callable[[float], float], most: float, own: random.Random
) -> Iterator[float]:
    """Poisson with a rate of `rate * level(now)`, by thinning (Lewis and Shedler, 1979)."""
    now = 0.0
    while True:
        now += own.expovariate(rate * most)
        if own.random() * most < level(now):
            yield now


def _poisson(rng: random.Random, mean: float) -> int:
    """A Poisson number, by counting arrivals in a unit of time."""
    count, now = 0, rng.expovariate(mean)
    while now < 1:
        count, now = count + 1, now + rng.expovariate(mean)
    return count
