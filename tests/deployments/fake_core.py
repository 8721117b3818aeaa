"""A core that repeats the prompt: deterministic, no model, the same surface as EngineCore."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engine.config import EngineConfig
from engine.errors import InvalidRequest
from engine.outputs import EngineLoad, TokenDelta
from engine.request import EngineRequest
from engine.snapshot import EngineSnapshot

BLOCK_SIZE = 16
TOTAL_BLOCKS = 4096
QUEUED_S, PREFILL_S = 0.001, 0.002
"""What it says of each request's start."""


@dataclass(frozen=True)
class FakeInfo:
    model: str = "fake"
    device: str = "cpu"
    max_num_batched_tokens: int = 1024
    max_model_len: int = 4096
    block_size: int = BLOCK_SIZE
    num_blocks: int = TOTAL_BLOCKS
    vocab_size: int = 49152
    hidden_size: int = 8
    startup_seconds: dict[str, float] = field(default_factory=dict)


def expected_tokens(prompt: list[int], count: int) -> list[int]:
    """What the fake core generates."""
    return [prompt[i % len(prompt)] for i in range(count)]


def expected_states(prompt: list[int], pooling: str) -> np.ndarray:
    """What the fake core pools."""
    first = prompt[-1] if pooling == "last" else sum(prompt) / len(prompt)
    return np.sin(np.arange(1.0, FakeInfo.hidden_size + 1) * (1 + first)).astype(np.float32)


class FakeCore:
    """Each step adds one token to each of at most `max_num_seqs` requests.

    Where the file `hang_once` exists, the core that finds it first in a step deletes it and hangs.
    """

    def __init__(
        self,
        config: EngineConfig,
        step_s: float = 0.0,
        die_at_token: int = -1,
        hang_once: str | None = None,
        max_model_len: int = FakeInfo.max_model_len,
    ) -> None:
        self.info = FakeInfo(model=config.model, max_model_len=max_model_len)
        self._step_s = step_s
        self._die_at_token = die_at_token
        self._hang_once = Path(hang_once) if hang_once else None
        self._max_num_seqs = config.max_num_seqs
        self._requests: dict[str, EngineRequest] = {}
        self._done: dict[str, int] = {}
        self._steps = 0
        self._prefilled = 0
        self._generated = 0

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def add(self, wire: EngineRequest) -> None:
        if len(wire.prompt_token_ids) >= self.info.max_model_len:
            raise InvalidRequest("the prompt is too long.", "prompt")
        self._requests[wire.request_id] = wire
        self._done[wire.request_id] = len(wire.output_token_ids)
        self._prefilled += len(wire.prompt_token_ids)

    def abort(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._requests.pop(request_id, None)

    def step(self) -> list[TokenDelta]:
        time.sleep(self._step_s)
        self._hang_if_told()
        self._steps += 1
        running = list(self._requests.values())[: self._max_num_seqs]
        return [self._advance(request) for request in running]

    def load(self) -> EngineLoad:
        running = list(self._requests.values())[: self._max_num_seqs]
        waiting = list(self._requests.values())[self._max_num_seqs :]
        sizes = [len(r.prompt_token_ids) + self._done[r.request_id] for r in running]
        return EngineLoad(
            num_running=len(running),
            num_waiting=len(waiting),
            running_tokens=sum(sizes),
            waiting_tokens=sum(len(r.prompt_token_ids) for r in waiting),
            free_blocks=TOTAL_BLOCKS - sum(math.ceil(size / BLOCK_SIZE) for size in sizes),
            total_blocks=TOTAL_BLOCKS,
            step=self._steps,
            block_size=BLOCK_SIZE,
            prefilled_tokens=self._prefilled,
            generated_tokens=self._generated,
        )

    def snapshot(self) -> EngineSnapshot:
        return EngineSnapshot(self.load(), 0, [], [], [])

    def check_invariants(self) -> None:
        assert self.load().num_running == self.load().num_waiting == 0

    def fail_all(self, error: str) -> list[TokenDelta]:
        lost = list(self._requests)
        self._requests.clear()
        return [TokenDelta(i, [], finish_reason="error", error=error) for i in lost]

    def _hang_if_told(self) -> None:
        if self._hang_once is not None and self._hang_once.exists():
            self._hang_once.unlink()
            threading.Event().wait()

    def _advance(self, request: EngineRequest) -> TokenDelta:
        request_id = request.request_id
        if request.pooling is not None:
            del self._requests[request_id]
            states = expected_states(request.prompt_token_ids, request.pooling)
            return TokenDelta(request_id, [], "stop", pooled=states.tobytes())
        done = self._done[request_id]
        if done == self._die_at_token:
            raise RuntimeError("told to die")
        self._done[request_id] = done + 1
        self._generated += 1
        delta = TokenDelta(request_id, expected_tokens(request.prompt_token_ids, done + 1)[-1:])
        if done == len(request.output_token_ids):
            delta.queued_s, delta.prefill_s = QUEUED_S, PREFILL_S
        limit = self.info.max_model_len - len(request.prompt_token_ids)
        most = request.params.max_tokens
        if done + 1 >= (limit if most is None else min(limit, most)):
            delta.finish_reason = "length"
            del self._requests[request_id]
        return delta
