"""The engine's real scheduler and block pool in simulated time, one step after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.simulate.engine import EngineShape
from engine.config import EngineConfig
from engine.request import EngineRequest, Request
from engine.sampling_params import SamplingParams
from engine.scheduler.scheduler import Scheduler
from engine.step import StepPlan, StepResult


@dataclass
class Arrival:
    """A request: when it reaches the engine, its prompt, and how long its answer is."""

    when: float
    prompt: list[int]
    output: int


class RealEngine:
    """Plans and waits in the order in which `EngineCore.step` does."""

    def __init__(self, shape: EngineShape, arrivals: Sequence[Arrival]) -> None:
        self.first_tokens: dict[str, float] = {}
        self.ends: dict[str, float] = {}
        self._shape = shape
        self._now = self._device_free = 0.0
        self._arrivals = list(enumerate(arrivals))
        self.scheduler = Scheduler(
            EngineConfig(max_num_seqs=shape.max_num_seqs),
            num_blocks=shape.cache_tokens // shape.block_size + 1,
            block_size=shape.block_size,
            max_model_len=shape.cache_tokens,
            max_num_batched_tokens=shape.max_num_batched_tokens,
            eos_token_ids=(),
        )

    def run(self) -> None:
        in_flight: tuple[StepPlan, float] | None = None
        while self._arrivals or in_flight or self.scheduler.has_work:
            self._submit()
            newest = self._launch()
            due = newest
            if self._shape.steps_ahead:
                due, in_flight = in_flight, newest
            if due is not None:
                self._now = max(self._now, due[1])
                self._update(due[0])
            elif newest is None:
                self._now = self._arrivals[0][1].when

    def _submit(self) -> None:
        while self._arrivals and self._arrivals[0][1].when <= self._now:
            number, arrival = self._arrivals.pop(0)
            params = SamplingParams(max_tokens=arrival.output, ignore_eos=True, seed=0)
            wire = EngineRequest(str(number), arrival.prompt, params)
            self.scheduler.add(Request.from_wire(wire, self._shape.cache_tokens))

    def _launch(self) -> tuple[StepPlan, float] | None:
        plan = self.scheduler.schedule()
        if not plan.rows:
            return None
        requests = self.scheduler._in_flight[-1].requests
        prefill = rows = 0
        for request, start, count in zip(requests, plan.starts, plan.num_tokens, strict=True):
            if start < request.num_prompt_tokens:
                prefill += count
            else:
                rows += 1
        seconds = self._shape.step_time.step(rows, sum(plan.starts) + plan.total_tokens, prefill)
        self._device_free = max(self._device_free, self._now) + seconds
        return plan, self._device_free

    def _update(self, plan: StepPlan) -> None:
        count = len(self.scheduler._in_flight[0].sampled)
        for delta in self.scheduler.update(plan, StepResult([7] * count)):
            self.first_tokens.setdefault(delta.request_id, self._now)
            if delta.finish_reason is not None:
                self.ends[delta.request_id] = self._now
