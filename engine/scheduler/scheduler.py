"""The unified scheduler: every step, each request catches up with its tokens."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable

from engine.config import EngineConfig
from engine.errors import ConfigError, InvalidRequest
from engine.kv_cache.block_allocator import BlockAllocator
from engine.kv_cache.block_pool import InvariantViolation
from engine.outputs import EngineLoad, TokenDelta, failed
from engine.request import Request, Status
from engine.scheduler.delivery import Delivery
from engine.scheduler.planner import StepPlanner
from engine.scheduler.policies import build_policy
from engine.scheduler.preemption import ForcedPreemption
from engine.scheduler.running_batch import RunningBatch
from engine.scheduler.step_builder import ScheduledStep, StepBuilder
from engine.scheduler.waiting_queue import WaitingQueue
from engine.snapshot import EngineSnapshot, RequestSnapshot, StepSnapshot
from engine.step import StepPlan, StepResult
from engine.step_times import UNKNOWN_TIMES, StepTimes

BUDGET_GROWTH = 1 / 16
"""Share by which every good step widens a token budget that was lowered for want of memory."""


class Scheduler:
    """Plans steps and takes in their results.

    There is no prefill and no decode phase: a request has computed so many of its tokens, and a
    step computes some more. `schedule` may be called once more before the `update` of the step
    before it: the tokens of the step in flight then are on the device only. Steps must be executed
    in the order in which they were scheduled, and updated in that order.

    Args:
        config: policy, limits and switches.
        num_blocks: blocks of the KV cache, the null block included.
        block_size: tokens in a block.
        max_model_len: most tokens of a sequence.
        max_num_batched_tokens: token budget of a step.
        eos_token_ids: the model's end-of-sequence tokens.
        clock: seconds, never going back; measures how long a request waits.
        times: of steps, by their size.

    Raises:
        ConfigError: the cache cannot hold one sequence of `max_model_len`.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        max_num_batched_tokens: int,
        eos_token_ids: Collection[int],
        clock: Callable[[], float] = time.monotonic,
        times: StepTimes = UNKNOWN_TIMES,
    ) -> None:
        if (num_blocks - 1) * block_size < max_model_len:
            raise ConfigError(
                f"{num_blocks - 1} KV cache blocks of {block_size} tokens cannot hold one sequence "
                f"of max_model_len = {max_model_len}; lower it or allow more memory."
            )
        policy = build_policy(config)
        self._blocks = BlockAllocator(num_blocks, block_size, config.enable_prefix_caching)
        self._running = RunningBatch(policy, config.max_num_seqs, self._blocks)
        self._waiting = WaitingQueue(policy, clock)
        self._planner = StepPlanner(config, self._blocks, self._running, self._waiting, times)
        self._delivery = Delivery(frozenset(eos_token_ids))
        self._forced = ForcedPreemption(config.force_preempt_every)
        self._token_budget = self._full_budget = max_num_batched_tokens
        self._max_model_len = max_model_len
        self._requests: dict[str, Request] = {}
        self._with_grammar: set[str] = set()
        """Ids of the requests whose outputs follow a grammar."""
        self._in_flight: deque[ScheduledStep] = deque()
        self._last: ScheduledStep | None = None

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._requests)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InvalidRequest: its id is taken, or it is too long to run or to generate anything.
        """
        if request.request_id in self._requests:
            raise InvalidRequest(
                f"request id '{request.request_id}' is in use; choose another.", "request_id"
            )
        most = self._max_model_len + (request.pooling is not None)
        limit = request.max_total_tokens = min(request.max_total_tokens, most)
        if len(request.token_ids) >= limit:
            raise InvalidRequest(
                f"the request holds {len(request.token_ids)} tokens and may have {limit} in all, "
                "so none is left to generate; shorten the prompt or raise max_tokens.",
                "prompt",
            )
        self._requests[request.request_id] = request
        if request.matcher is not None:
            self._with_grammar.add(request.request_id)
        self._waiting.push(request)

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests without another word; unknown ids are ignored."""
        found = [self._requests[i] for i in dict.fromkeys(request_ids) if i in self._requests]
        self._finish(found)

    def schedule(self) -> StepPlan:
        """Plan the next step; a plan without rows means that there is nothing to do now."""
        step = StepBuilder(self._last.plan.step + 1 if self._last else 1, self._token_budget)
        victim = self._forced.victim(step.plan.step, self._last)
        if victim is not None:
            self._planner.preempt(victim, step)
        self._planner.fill(step)
        if step.is_empty:
            return step.plan
        self._last = step.build()
        if self._with_grammar:
            self._last.plan.masked = [
                place for place, r in enumerate(self._last.sampled) if r.matcher is not None
            ]
        self._in_flight.append(self._last)
        return self._last.plan

    def update(self, plan: StepPlan, result: StepResult) -> list[TokenDelta]:
        """Take in the result of the oldest step in flight; returns what is new of each request.

        Raises:
            InvariantViolation: `plan` is not the oldest step in flight.
        """
        if not self._in_flight or self._in_flight[0].plan is not plan:
            raise InvariantViolation(f"step {plan.step} is not the oldest step in flight")
        step = self._in_flight.popleft()
        if self._token_budget < self._full_budget:
            wider = self._token_budget + int(self._token_budget * BUDGET_GROWTH) + 1
            self._token_budget = min(wider, self._full_budget)
        self._running.step_done(plan.step)
        deltas, finished = self._delivery.deliver(step, result)
        self._finish(finished)
        return deltas

    def masked_rows(self, plan: StepPlan) -> list[tuple[int, Request]]:
        """The places of `plan.masked` and their requests; of the step that was planned last."""
        step = self._last
        if step is None or step.plan is not plan:
            raise InvariantViolation(f"step {plan.step} is not the last one")
        return [(place, step.sampled[place]) for place in plan.masked]

    def fail_all(self, error: str) -> list[TokenDelta]:
        """End every request with `error` and forget the steps in flight and all cached blocks."""
        deltas = [failed(request_id, error) for request_id in self._requests]
        for request in self._requests.values():
            request.status = Status.FINISHED
        self._requests.clear()
        self._with_grammar.clear()
        self._waiting.clear()
        self._running.clear()
        self._in_flight.clear()
        self._blocks.pool.reset()
        return deltas

    def fail_in_flight(self, error: str) -> list[TokenDelta]:
        """End the requests of all steps in flight with `error`, and forget these steps.

        All cached blocks are forgotten as well, as a step that failed may not have written what it
        registered: requests that run but were in none of these steps are computed anew.
        """
        return self._abandon_in_flight(self._requests_in_flight(), error)

    def retry_in_flight(self, error: str) -> list[TokenDelta]:
        """Compute the requests of all steps in flight anew, at first with half the tokens a step.

        For steps that ran out of memory. A request that this happens to for the second time ends
        with `error`, and so does one that was alone: smaller steps do not help it.
        """
        largest = max((step.plan.total_tokens for step in self._in_flight), default=0)
        if largest:
            self._token_budget = max(1, largest // 2)
        concerned = self._requests_in_flight()
        lost = [r for r in concerned if r.ran_out_of_memory or len(concerned) == 1]
        for request in concerned:
            request.ran_out_of_memory = True
            request.num_in_flight = 0
        return self._abandon_in_flight(lost, error)

    def _requests_in_flight(self) -> list[Request]:
        concerned = dict.fromkeys(r for step in self._in_flight for r in step.requests)
        return [request for request in concerned if not request.finished]

    def _abandon_in_flight(self, lost: list[Request], error: str) -> list[TokenDelta]:
        """Forget the steps in flight and all blocks; all but the lost requests start anew."""
        self._in_flight.clear()
        self._finish(lost)
        for request in self._running.requests.copy():
            self._planner.send_back(request)
        self._running.clear()
        self._blocks.pool.reset()
        return [failed(request.request_id, error) for request in lost]

    def load(self) -> EngineLoad:
        """The load now."""
        held, to_prefill = 0, self._waiting.num_prompt_tokens
        for request in self._running.requests:
            computed = request.num_computed_tokens
            held += computed
            if computed < request.num_prompt_tokens:
                to_prefill += request.num_prompt_tokens - computed
        pool = self._blocks.pool
        return EngineLoad(
            num_running=len(self._running.requests),
            num_waiting=len(self._waiting),
            running_tokens=held,
            waiting_tokens=to_prefill,
            free_blocks=pool.num_free_blocks,
            total_blocks=pool.num_usable_blocks,
            step=self._running.done_step,
            num_preemptions=self._planner.num_preemptions,
            prefix_queries=self._planner.prefix_queries,
            prefix_hits=self._planner.prefix_hits,
            block_size=self._blocks.block_size,
            prefilled_tokens=self._planner.prefilled_tokens,
            generated_tokens=self._delivery.generated_tokens,
        )

    def snapshot(self) -> EngineSnapshot:
        """What is scheduled and what waits, for a crash dump."""
        in_flight = list(self._in_flight)
        last = [self._last] if self._last and not in_flight else []
        return EngineSnapshot(
            self.load(),
            self._token_budget,
            [StepSnapshot.of(s.plan, s.requests, bool(in_flight)) for s in in_flight or last],
            [RequestSnapshot.of(request) for request in self._running.requests],
            [RequestSnapshot.of(request) for request in self._waiting],
        )

    def check_invariants(self) -> None:
        """Check rows, blocks and membership.

        Raises:
            InvariantViolation: the bookkeeping contradicts itself.
        """
        self._running.check_invariants()
        waiting, running = list(self._waiting), self._running.requests
        if {id(r) for r in self._requests.values()} != {id(r) for r in waiting + running}:
            raise InvariantViolation("a request neither waits nor runs, or is not known")
        if any(r.status is not Status.WAITING or r.block_ids for r in waiting):
            raise InvariantViolation("a waiting request holds blocks or has a wrong status")
        if any(r.status is not Status.RUNNING for r in running):
            raise InvariantViolation("a running request has a wrong status")

    def _finish(self, requests: list[Request]) -> None:
        left = []
        for request in requests:
            if request.status is Status.RUNNING:
                left.append(request)
            else:
                self._waiting.discard(request)
            request.status = Status.FINISHED
            del self._requests[request.request_id]
            self._with_grammar.discard(request.request_id)
        if left:
            self._running.drop_finished(left)
