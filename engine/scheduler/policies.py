"""Who comes first: one small class for each scheduling policy."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

from engine.config import EngineConfig
from engine.request import Request


class Policy(ABC):
    """Orders requests; smaller keys go first, ties keep the order of arrival in the queue.

    A preempted request goes ahead of those of the same standing that never started: what is left
    of its blocks in the cache is lost soon.
    """

    max_wait_s: float = math.inf
    """A request that has waited this long is admitted before all others, oldest first."""

    @abstractmethod
    def waiting_key(self, request: Request) -> tuple[Any, ...]:
        """Order of admission; taken when the request joins the queue."""

    @abstractmethod
    def running_key(self, request: Request) -> tuple[Any, ...]:
        """Order in which running requests get tokens and blocks; fixed while one runs."""


class FirstComeFirstServed(Policy):
    """By time of arrival."""

    def waiting_key(self, request: Request) -> tuple[Any, ...]:
        """Preempted ones, then by arrival."""
        return (request.num_preemptions == 0, request.arrival_time)

    def running_key(self, request: Request) -> tuple[Any, ...]:
        """By arrival."""
        return (request.arrival_time,)


class Priority(Policy):
    """By `priority`, lower first; then by time of arrival."""

    def waiting_key(self, request: Request) -> tuple[Any, ...]:
        """By priority; within one, preempted ones first, then by arrival."""
        return (request.priority, request.num_preemptions == 0, request.arrival_time)

    def running_key(self, request: Request) -> tuple[Any, ...]:
        """By priority, then by arrival."""
        return (request.priority, request.arrival_time)


class ShortestJobFirst(Policy):
    """By tokens left to prefill; whoever has waited `max_wait_s` goes before all others.

    That bounds starvation: past the wait, only requests that have waited longer are ahead.
    """

    def __init__(self, max_wait_s: float) -> None:
        self.max_wait_s = max_wait_s

    def waiting_key(self, request: Request) -> tuple[Any, ...]:
        """By tokens to compute: all of them while it waits, for nothing is held for it."""
        return (request.num_tokens, request.num_preemptions == 0)

    def running_key(self, request: Request) -> tuple[Any, ...]:
        """Equal for all: running requests keep the order of their admission."""
        return ()


def build_policy(config: EngineConfig) -> Policy:
    """The policy that the configuration names."""
    if config.scheduling_policy == "sjf":
        return ShortestJobFirst(config.sjf_max_wait_s)
    return Priority() if config.scheduling_policy == "priority" else FirstComeFirstServed()
