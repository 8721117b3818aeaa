"""Plans a step: which tokens of which requests it computes, and who starts or yields for it."""

from __future__ import annotations

from engine.config import EngineConfig
from engine.kv_cache.block_allocator import BlockAllocator
from engine.request import Request, Status
from engine.scheduler.preemption import choose_victim
from engine.scheduler.running_batch import RunningBatch
from engine.scheduler.step_builder import StepBuilder
from engine.scheduler.waiting_queue import WaitingQueue
from engine.step_times import UNKNOWN_TIMES, StepTimes

ADMISSION_HEADROOM = 0.02
"""Share of the blocks that an admission leaves to the requests that run.

In simulation (100 to 1024 tokens in and out, a pool of 64,000) this takes recomputed tokens from
30 % to 7 % for 1 % more steps.
"""

MAX_CONTEXTS = 8
"""A step computes a prompt's tokens after at most so many times as many others.

Few tokens after many take longer than step times tell, as these are measured without a context.
"""


class StepPlanner:
    """Lets running requests catch up with their tokens, and waiting ones start with what is left.

    Args:
        config: switches.
        blocks: of all requests.
        running: requests that may compute.
        waiting: requests that may start.
        times: of steps, by their size.
    """

    def __init__(
        self,
        config: EngineConfig,
        blocks: BlockAllocator,
        running: RunningBatch,
        waiting: WaitingQueue,
        times: StepTimes,
    ) -> None:
        self.num_preemptions = 0
        """Requests sent back so far."""
        self.prefix_queries = 0
        """Prompt tokens of the requests that looked for a cached prefix."""
        self.prefix_hits = 0
        """Tokens of these that were found."""
        self.prefilled_tokens = 0
        """Prompt tokens that steps have computed or found, those of preempted requests again."""
        self._blocks = blocks
        self._running = running
        self._waiting = waiting
        self._times = UNKNOWN_TIMES if config.two_phase else times
        self._headroom = int(blocks.pool.num_blocks * ADMISSION_HEADROOM)
        self._two_phase = config.two_phase

    def fill(self, step: StepBuilder) -> None:
        """Give a step as much work as its budget, the rows and the blocks allow."""
        if self._two_phase:
            self._schedule_one_phase(step)
            return
        self._schedule_running(self._running.requests.copy(), step)
        self._admit(step)

    def preempt(self, request: Request, step: StepBuilder) -> None:
        """Take a running request's row and blocks before `step` computes any of it."""
        self.send_back(request)
        step.plan.num_preempted += 1

    def send_back(self, request: Request) -> None:
        """Let a running request wait until it is computed anew."""
        self._running.preempt(request)
        self._waiting.push(request)
        self.num_preemptions += 1

    def _schedule_one_phase(self, step: StepBuilder) -> None:
        """Prefill if anything is left to prefill or can be admitted, else decode."""
        running = self._running.requests
        self._schedule_running([r for r in running if _is_prefilling(r)], step)
        self._admit(step)
        if step.is_empty:
            self._schedule_running(running.copy(), step)

    def _schedule_running(self, requests: list[Request], step: StepBuilder) -> None:
        """Give each request, in order, the tokens it lacks, as far as budget and blocks go."""
        block_size, running = self._blocks.block_size, Status.RUNNING
        for request in requests:
            if not step.budget:
                return
            num_tokens = len(request.token_ids) + request.num_in_flight
            if num_tokens >= request.max_total_tokens or request.status is not running:
                continue  # its last token is in flight, or it was preempted just now
            start = request.num_computed_tokens
            count = num_tokens - start
            if count > 1 and not (count := self._share(request, count, step)):
                continue
            end = start + count
            if end > len(request.block_ids) * block_size and not self._grow(request, end, step):
                continue
            step.add(request, count)
            if count > 1:
                self._blocks.register(request)
                self.prefilled_tokens += max(0, min(end, request.num_prompt_tokens) - start)

    def _grow(self, request: Request, num_tokens: int, step: StepBuilder) -> bool:
        """Get blocks up to `num_tokens`, by preemption if need be; False if it has to wait."""
        while (added := self._blocks.grow(request, num_tokens)) is None:
            if self._running.blocks_are_due:
                return False
            running = self._running.requests
            victim = choose_victim(running[running.index(request) :], self._blocks)
            self.preempt(victim, step)
            if victim is request:
                return False
        step.add_blocks(request, added)
        return True

    def _admit(self, step: StepBuilder) -> None:
        """Start waiting requests while budget, rows and blocks last.

        One starts only if all its known tokens fit and those that run have room to grow, and none
        in a step that preempted: otherwise requests would take turns in throwing each other out.
        """
        if step.plan.num_preempted:
            return
        while step.budget and step.room != 0 and self._running.num_free_rows:
            request = self._waiting.peek()
            if request is None or request.num_in_flight:
                return  # a preempted one still awaits its token
            spare = self._headroom if self._running.requests else 0
            if not self._blocks.admit(request, spare):
                return
            self._waiting.discard(request)
            self._running.start(request)
            self._count_prefix(request)
            step.add_new_row(request)
            missing = len(request.token_ids) - request.num_computed_tokens
            step.add(request, self._share(request, missing, step))
            self.prefilled_tokens += min(request.num_computed_tokens, request.num_prompt_tokens)
            self._blocks.register(request)

    def _share(self, request: Request, missing: int, step: StepBuilder) -> int:
        """How many of its `missing` tokens a request computes in `step`; 0 if that is full."""
        if missing == 1:
            return 1
        if step.room is None:
            step.room = self._room(request, missing, step.budget)
        share = min(missing, step.room, step.budget)
        step.room -= share
        return share

    def _room(self, request: Request, missing: int, budget: int) -> int:
        """Tokens of prompts that a step had better compute, the first of them of `request`.

        What waits counts in full, though some of it may be cached, or find no blocks.
        """
        running = self._running.requests
        if request.computes_whole_prompt or len(running) > self._times.max_rows:
            return budget  # no graph runs such a step
        decodes = sum(map(_is_decoding, running))
        waiting, free_rows = self._waiting, self._running.num_free_rows
        lacking = missing + (waiting.num_prompt_tokens if free_rows else 0)
        batch = decodes + request.decodes + min(waiting.num_to_decode, free_rows)
        least = max(1, request.num_computed_tokens // MAX_CONTEXTS)
        end = self._times.end(decodes, lacking, budget, batch, least)
        return end - decodes if end < decodes + lacking else budget

    def _count_prefix(self, request: Request) -> None:
        if request.num_preemptions or not self._blocks.can_share(request):
            return
        request.num_cached_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
        self.prefix_queries += request.num_prompt_tokens
        self.prefix_hits += request.num_cached_tokens


def _is_prefilling(request: Request) -> bool:
    return request.num_tokens - request.num_computed_tokens > 1


def _is_decoding(request: Request) -> bool:
    num_tokens = request.num_tokens
    return num_tokens - request.num_computed_tokens == 1 and num_tokens < request.max_total_tokens
