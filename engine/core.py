"""EngineCore: schedule → execute → update, one step at a time or one step ahead."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable

import torch

from engine.config import EngineConfig
from engine.errors import InvalidRequest
from engine.outputs import EngineLoad, TokenDelta
from engine.profile import StepRecord, add_device_times
from engine.request import EngineRequest, Request
from engine.runner.build import build_runner
from engine.runner.model_runner import PendingStep
from engine.scheduler.scheduler import Scheduler
from engine.startup import Stopwatch
from engine.step import StepPlan


class EngineCore:
    """One model on one device. Not thread-safe: `EngineLoop` gives it a thread of its own.

    Raises:
        ConfigError: the model or an option cannot be used.
    """

    def __init__(self, config: EngineConfig, stopwatch: Stopwatch | None = None) -> None:
        self.config = config
        self.runner, self.info = build_runner(config, stopwatch or Stopwatch())
        self.scheduler = Scheduler(
            config,
            num_blocks=self.info.num_blocks,
            block_size=self.info.block_size,
            max_model_len=self.info.max_model_len,
            max_num_batched_tokens=self.info.max_num_batched_tokens,
            eos_token_ids=self.info.eos_token_ids,
        )
        ahead = config.async_scheduling
        self._one_step_ahead = self.info.device != "cpu" if ahead is None else ahead
        self._in_flight: tuple[StepPlan, PendingStep, float] | None = None
        """A plan, its step, and the seconds that scheduling it took."""
        self._records: list[StepRecord] = []
        self._timers: list[tuple[torch.cuda.Event, torch.cuda.Event] | None] = []

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return self._in_flight is not None or self.scheduler.has_work

    def add(self, wire: EngineRequest) -> None:
        """Queue a request.

        Raises:
            InvalidRequest: it can never run here.
        """
        self._check(wire)
        self.scheduler.add(Request.from_wire(wire, self.info.max_model_len))

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests without another word; unknown ids are ignored."""
        self.scheduler.abort(request_ids)

    def load(self) -> EngineLoad:
        """The load after the last step."""
        return self.scheduler.load()

    def step(self) -> list[TokenDelta]:
        """Do one step and return what is new.

        One step ahead, step N+1 is launched before the tokens of step N are read: the device works
        while the host updates.
        """
        began = time.perf_counter()
        plan = self.scheduler.schedule()
        schedule_s = time.perf_counter() - began
        launched = (plan, self.runner.execute(plan), schedule_s) if plan.rows else None
        if self._one_step_ahead:
            launched, self._in_flight = self._in_flight, launched
        if launched is None:
            return []
        plan, pending, schedule_s = launched
        began = time.perf_counter()
        result = pending.result()
        arrived = time.perf_counter()
        deltas = self.scheduler.update(plan, result)
        if self.runner.profiling:
            updated = time.perf_counter()
            self._book(plan, pending, schedule_s, arrived - began, updated - arrived)
        return deltas

    def start_profile(self) -> None:
        """Keep a record of every step from now on."""
        self._records, self._timers = [], []
        self.runner.profiling = True

    def stop_profile(self) -> list[StepRecord]:
        """Records of the steps since `start_profile`; waits for the device."""
        self.runner.profiling = False
        if self.info.device != "cpu":
            torch.cuda.synchronize()
        add_device_times(self._records, self._timers)
        return self._records

    def _book(
        self,
        plan: StepPlan,
        pending: PendingStep,
        schedule_s: float,
        wait_s: float,
        update_s: float,
    ) -> None:
        self._timers.append(pending.timers)
        self._records.append(
            StepRecord(
                rows=len(plan.rows),
                tokens=plan.total_tokens,
                context_tokens=sum(plan.starts) + plan.total_tokens,
                decode=plan.total_tokens == len(plan.rows),
                schedule_s=schedule_s,
                prepare_s=pending.prepare_s,
                launch_s=pending.launch_s,
                wait_s=wait_s,
                update_s=update_s,
            )
        )

    def fail_all(self, error: str) -> list[TokenDelta]:
        """End every request with `error`, a sentence for the client."""
        self._in_flight = None
        return self.scheduler.fail_all(error)

    def check_invariants(self) -> None:
        """Check the scheduler's bookkeeping.

        Raises:
            InvariantViolation: it contradicts itself.
        """
        self.scheduler.check_invariants()

    def _check(self, wire: EngineRequest) -> None:
        num_prompt, limit = len(wire.prompt_token_ids), self.info.max_model_len
        if num_prompt == 0:
            raise InvalidRequest("the prompt must hold at least one token.", "prompt")
        if num_prompt >= limit:
            raise InvalidRequest(
                f"the prompt has {num_prompt} tokens, but max_model_len is {limit} and at least "
                "one token must be left to generate; shorten the prompt.",
                "prompt",
            )
        self._check_vocabulary(wire.prompt_token_ids, "prompt")
        self._check_vocabulary(wire.params.stop_token_ids, "stop_token_ids")
        self._check_vocabulary(wire.params.logit_bias or (), "logit_bias")

    def _check_vocabulary(self, token_ids: Collection[int], param: str) -> None:
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self.info.vocab_size:
            raise InvalidRequest(
                f"{param} holds a token id outside 0 to {self.info.vocab_size - 1}.", param
            )
