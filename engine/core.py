"""EngineCore: schedule → execute → update, one step at a time or one step ahead."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import cast

import torch

from engine.config import EngineConfig
from engine.errors import InvalidRequest, StepFailed
from engine.failures import Failure, classify, drop_locals
from engine.inputs import check_request
from engine.launched import BuildRunner, LaunchedStep, MaskedStep
from engine.outputs import EngineLoad, TokenDelta, failed, refusal
from engine.parallel.leading import build_ranks
from engine.profile import IdleTime, StepRecord, add_device_times
from engine.request import EngineRequest, Request
from engine.scheduler.scheduler import Scheduler
from engine.snapshot import EngineSnapshot
from engine.startup import Stopwatch
from engine.step import StepPlan
from engine.structured_outputs.constraints import Constraints
from engine.structured_outputs.grammar import GrammarHost
from engine.structured_outputs.messages import Setup

MAX_FAILED_STEPS = 3
"""So many failed steps, with no good one between them, and the engine gives up."""
OUT_OF_MEMORY = (
    "a step ran out of memory; {lost} of its requests are lost and the others computed anew, in "
    "smaller steps; lower max_num_batched_tokens, max_num_seqs or gpu_memory_utilization."
)
OUT_OF_MEMORY_TOLD = "The engine ran out of memory for the request; try again."
FAILED_TOLD = "The engine failed in a step of the request; try again."


class EngineCore:
    """One model on one device. Not thread-safe: `EngineLoop` gives it a thread of its own.

    Args:
        config: of the engine.
        stopwatch: gets the times of the start's stages.
        build: makes the runner; another than the usual one stands in for a model.

    Raises:
        ConfigError: the model or an option cannot be used.
    """

    def __init__(
        self,
        config: EngineConfig,
        stopwatch: Stopwatch | None = None,
        build: BuildRunner = build_ranks,
    ) -> None:
        self.config = config
        self.runner, self.info = build(config, stopwatch or Stopwatch())
        self.scheduler = Scheduler(
            config,
            num_blocks=self.info.num_blocks,
            block_size=self.info.block_size,
            max_model_len=self.info.max_model_len,
            max_num_batched_tokens=self.info.max_num_batched_tokens,
            eos_token_ids=self.info.eos_token_ids,
            times=self.info.step_times,
        )
        ahead = config.async_scheduling
        self._one_step_ahead = self.info.device != "cpu" if ahead is None else ahead
        self._in_flight: LaunchedStep | None = None
        self._idle = IdleTime()
        setup = Setup(config.model, self.info.vocab_size, self.info.eos_token_ids)
        self.constraints = Constraints(
            GrammarHost(setup), self.info.eos_token_ids, self.info.device != "cpu"
        )
        self._refused: list[TokenDelta] = []
        self._late_error: Exception | None = None
        """Of a sampling that was launched after the step before it had been taken in."""
        self._failed_in_a_row = 0
        self._records: list[StepRecord] = []
        self._timers: list[tuple[torch.cuda.Event, torch.cuda.Event] | None] = []

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        if self._in_flight is not None or self.scheduler.has_work:
            return True
        return bool(self.constraints.waiting)

    def add(self, wire: EngineRequest) -> None:
        """Queue a request.

        Raises:
            InvalidRequest: it can never run here.
        """
        check_request(wire, self.info)
        request = Request.from_wire(wire, self.info.max_model_len)
        if wire.params.structured_outputs is None:
            self.scheduler.add(request)
        else:
            self.constraints.add(request)

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests without another word; unknown ids are ignored."""
        ids = list(request_ids)
        self.scheduler.abort(ids)
        if self.constraints.waiting:
            self.constraints.abort(ids)

    def load(self) -> EngineLoad:
        """The load after the last step."""
        load = self.scheduler.load()
        load.num_waiting += len(self.constraints.waiting)
        load.waiting_tokens += sum(r.num_prompt_tokens for r in self.constraints.waiting)
        load.idle_s = self._idle.seconds
        return load

    def step(self) -> list[TokenDelta]:
        """Do one step and return what is new.

        One step ahead, step N+1 is launched before the tokens of step N are read: the device works
        while the host updates. Where outputs follow grammars, the sampling of step N+1 is launched
        after that, as its masks depend on the tokens of step N; the forward pass runs meanwhile.

        Raises:
            StepFailed: the steps in flight are lost, and with them their requests, or for want of
                memory only those that a second try would not help.
            Exception: anything else means that the engine cannot go on.
        """
        if self.constraints.waiting:
            self._admit_constrained()
        began = time.perf_counter()
        plan = self.scheduler.schedule()
        schedule_s = time.perf_counter() - began
        try:
            newest, step = self._launch(plan, schedule_s)
            awaits_tokens = step is not None and step is not newest
            if plan.masked and not awaits_tokens:
                self._sample_masked(newest)
            launched = time.perf_counter()
            result = None if step is None else step.pending.result()
        except Exception as error:
            kind = classify(error)
            self._failed_in_a_row += 1
            if kind is Failure.DEVICE_LOST or self._failed_in_a_row == MAX_FAILED_STEPS:
                raise
            raise self._lose_steps(error, kind) from error
        if self._in_flight is None:
            self._idle.begin()
        if step is None or result is None:
            return self._with_refused([])
        arrived = time.perf_counter()
        deltas = self.scheduler.update(step.plan, result)
        if result.token_ids:  # a step that samples nothing may not have run yet
            self._failed_in_a_row = 0
        if plan.masked and awaits_tokens:
            self._sample_late(newest)
        if self.runner.profiling:
            self._book(step, arrived - launched, time.perf_counter() - arrived)
        return self._with_refused(deltas)

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

    def fail_all(self, error: str) -> list[TokenDelta]:
        """End every request with `error`, a sentence for the client, and the engine with them.

        A step in flight is left as it is: to free the memory of a device that is lost may end the
        process.
        """
        waiting = [failed(request.request_id, error) for request in self.constraints.waiting]
        self.constraints.waiting.clear()
        return self._with_refused(waiting + self.scheduler.fail_all(error))

    def snapshot(self) -> EngineSnapshot:
        """What the engine is at, for a crash dump; may be called while a step hangs."""
        return self.scheduler.snapshot()

    def check_invariants(self) -> None:
        """Check the scheduler's bookkeeping.

        Raises:
            InvariantViolation: it contradicts itself.
        """
        self.scheduler.check_invariants()

    def _launch(
        self, plan: StepPlan, schedule_s: float
    ) -> tuple[LaunchedStep | None, LaunchedStep | None]:
        """Launch a plan, unless it is empty; returns its step, and the one whose result is due."""
        if self._late_error is not None:
            error, self._late_error = self._late_error, None
            raise error
        newest = due = None
        if plan.rows:
            self._idle.end()
            newest = due = LaunchedStep(plan, self.runner.execute(plan), schedule_s)
        if self._one_step_ahead:
            due, self._in_flight = self._in_flight, newest
        return newest, due

    def _admit_constrained(self) -> None:
        """Schedule the requests whose grammars have been compiled meanwhile."""
        may_wait = self._in_flight is None and not self.scheduler.has_work
        ready, unusable = self.constraints.take_ready(may_wait)
        for request in ready:
            try:
                self.scheduler.add(request)
            except InvalidRequest as error:
                self._refused.append(refusal(request.request_id, error))
        self._refused += [self._unusable(request, error) for request, error in unusable]

    def _sample_masked(self, step: LaunchedStep | None) -> None:
        """Launch the sampling of a step, all of whose requests' tokens so far are known."""
        if step is None:
            return
        rows = self.scheduler.masked_rows(step.plan)
        masks, errors = self.constraints.masks(rows, self.info.vocab_size)
        if errors:
            self._refused += [self._unusable(request, error) for request, error in errors]
            self.scheduler.abort(request.request_id for request, _ in errors)
        cast(MaskedStep, step.pending).sample(masks)

    def _sample_late(self, step: LaunchedStep | None) -> None:
        """The same, after tokens have been taken in that are to be told before any failure."""
        try:
            self._sample_masked(step)
        except Exception as error:
            self._late_error = error

    def _unusable(self, request: Request, error: str) -> TokenDelta:
        """The end of a request whose grammar is of no use, for the reason `error`."""
        if request.matcher is not None and request.matcher.grammar.never_started:
            return failed(request.request_id, error)
        options = request.params.structured_outputs
        param = "structured_outputs" if options is None else options.param
        return refusal(request.request_id, InvalidRequest(f"{param} {error}", param))

    def _with_refused(self, deltas: list[TokenDelta]) -> list[TokenDelta]:
        """`deltas` after those that are still to be told."""
        if not self._refused:
            return deltas
        refused, self._refused = self._refused, []
        return refused + deltas

    def _lose_steps(self, error: Exception, kind: Failure) -> StepFailed:
        """Forget the steps in flight, free what they held, and tell what that means to whom."""
        if self.info.device != "cpu":
            torch.cuda.synchronize()  # raises if the device is lost after all
        self._in_flight = None
        self._idle.begin()
        drop_locals(error)
        if kind is Failure.OUT_OF_MEMORY:
            torch.cuda.empty_cache()  # does nothing without a GPU
            deltas = self.scheduler.retry_in_flight(OUT_OF_MEMORY_TOLD)
            message = OUT_OF_MEMORY.format(lost=len(deltas))
            return StepFailed(message, self._with_refused(deltas))
        message = f"a step failed, and its requests with it: {type(error).__name__}: {error}"
        return StepFailed(message, self._with_refused(self.scheduler.fail_in_flight(FAILED_TOLD)))

    def _book(self, step: LaunchedStep, wait_s: float, update_s: float) -> None:
        plan, pending = step.plan, step.pending
        self._timers.append(pending.timers)
        self._records.append(
            StepRecord(
                rows=len(plan.rows),
                tokens=plan.total_tokens,
                context_tokens=sum(plan.starts) + plan.total_tokens,
                decode=plan.total_tokens == len(plan.rows),
                schedule_s=step.schedule_s,
                prepare_s=pending.prepare_s,
                launch_s=pending.launch_s,
                wait_s=wait_s,
                update_s=update_s,
            )
        )
