"""An engine core without a model: tokens from the prompt, steps by the clock."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from benchmarks.serving.journal import JournalWriter
from engine.config import EngineConfig
from engine.errors import InvalidRequest
from engine.model_config import read_model_config
from engine.model_source import resolve_model
from engine.outputs import EngineLoad, TokenDelta
from engine.request import EngineRequest

BLOCK_SIZE = 16
TOTAL_BLOCKS = 65536
"""Enough that requests only ever wait for a row."""


@dataclass(frozen=True)
class FakeInfo:
    """The part of `EngineInfo` that means something here."""

    model: str
    max_model_len: int
    block_size: int = BLOCK_SIZE
    num_blocks: int = TOTAL_BLOCKS
    startup_seconds: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class _Row:
    """A request: its next token is `prompt[position % len(prompt)]`."""

    request_id: str
    prompt: list[int]
    position: int
    """Output tokens so far."""
    end: int
    """Output tokens at which it is finished."""


class FakeCore:
    """Gives each of at most `max_num_seqs` requests one token a step.

    The output repeats the prompt, so that a client can check every character. The end token plays
    no part, and prefill takes no time.

    A step lasts `step_s` on a device that, as with one step launched ahead, begins the next step by
    itself: the host's work between two steps is hidden unless it takes longer than a step.

    Args:
        config: `max_num_seqs`, `max_model_len` and the model's name are used.
        step_s: seconds of a step.
        journal: folder to write an account of the steps to, if any.
    """

    def __init__(self, config: EngineConfig, step_s: float, journal: Path | None = None) -> None:
        shape = read_model_config(resolve_model(config.model))
        limit = config.resolve_max_model_len(shape.max_position_embeddings)
        self.info = FakeInfo(config.model, limit)
        self._step_s = step_s
        self._journal = JournalWriter(journal) if journal else None
        self._max_num_seqs = config.max_num_seqs
        self._running: dict[str, _Row] = {}
        self._waiting: dict[str, _Row] = {}
        self._steps = 0
        self._due = 0.0
        """When the last step ended, in seconds of `time.monotonic()`."""
        self._idle = True

    @property
    def has_work(self) -> bool:
        """Whether there are requests."""
        return bool(self._running or self._waiting)

    def add(self, wire: EngineRequest) -> None:
        """Queue a request.

        Raises:
            InvalidRequest: its prompt leaves no room for output.
        """
        num_prompt = len(wire.prompt_token_ids)
        room = self.info.max_model_len - num_prompt
        if num_prompt == 0 or room <= 0:
            raise InvalidRequest(
                f"the prompt has {num_prompt} tokens; it must have 1 to {num_prompt + room - 1}.",
                "prompt",
            )
        wanted = wire.params.max_tokens
        end = room if wanted is None else min(room, wanted)
        done = len(wire.output_token_ids)
        self._waiting[wire.request_id] = _Row(wire.request_id, wire.prompt_token_ids, done, end)

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests without another word; unknown ids are ignored."""
        for request_id in request_ids:
            self._running.pop(request_id, None)
            self._waiting.pop(request_id, None)

    def step(self) -> list[TokenDelta]:
        """Wait for the end of a step and return each running request's next token."""
        joined = self._admit()
        self._sleep_until_due()
        self._steps += 1
        if self._journal:
            self._journal.write(self._due, [(row.request_id, row.position) for row in joined])
        deltas = [_advance(row) for row in self._running.values()]
        for delta in deltas:
            if delta.finish_reason is not None:
                del self._running[delta.request_id]
        self._idle = not self.has_work
        return deltas

    def load(self) -> EngineLoad:
        """The load after the last step."""
        rows = self._running.values()
        used = sum((len(row.prompt) + row.position) // BLOCK_SIZE + 1 for row in rows)
        return EngineLoad(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            running_tokens=sum(len(row.prompt) + row.position for row in rows),
            waiting_tokens=sum(len(row.prompt) for row in self._waiting.values()),
            free_blocks=max(TOTAL_BLOCKS - used, 0),
            total_blocks=TOTAL_BLOCKS,
            step=self._steps,
        )

    def fail_all(self, error: str) -> list[TokenDelta]:
        """End every request with `error`."""
        lost = [*self._running, *self._waiting]
        self._running, self._waiting = {}, {}
        return [TokenDelta(i, [], finish_reason="error", error=error) for i in lost]

    def check_invariants(self) -> None:
        """Nothing is kept that could contradict itself."""

    def _admit(self) -> list[_Row]:
        """Move requests that wait into free rows, in the order of their arrival."""
        free = self._max_num_seqs - len(self._running)
        joined = list(islice(self._waiting.values(), free))
        for row in joined:
            del self._waiting[row.request_id]
            self._running[row.request_id] = row
        return joined

    def _sleep_until_due(self) -> None:
        now = time.monotonic()
        self._due = now + self._step_s if self._idle else max(self._due + self._step_s, now)
        time.sleep(max(self._due - now, 0.0))


def _advance(row: _Row) -> TokenDelta:
    token = row.prompt[row.position % len(row.prompt)]
    row.position += 1
    return TokenDelta(row.request_id, [token], "length" if row.position >= row.end else None)
