"""Requests that hold a row and blocks."""

from __future__ import annotations

import time
from bisect import insort

from engine.kv_cache.block_allocator import BlockAllocator
from engine.kv_cache.block_pool import InvariantViolation
from engine.request import Request, Status
from engine.scheduler.policies import Policy


class RunningBatch:
    """Keeps running requests in policy order and gives out rows.

    A request may leave while a step that computes it is in flight. Its row is given to no one
    else before that step is done, for the step's result speaks of the row. The blocks of a
    finished request wait likewise; those of a preempted one are free at once, as somebody needs
    them now: what reuses them is a later step, and steps execute in order.
    """

    def __init__(self, policy: Policy, max_num_seqs: int, blocks: BlockAllocator) -> None:
        self.requests: list[Request] = []
        """In policy order."""
        self.done_step = 0
        """The last step that was done."""
        self._policy = policy
        self._max_num_seqs = max_num_seqs
        self._blocks = blocks
        self._draining: list[tuple[int, int, Request | None]] = []
        self.clear()

    def clear(self) -> None:
        """Forget all requests; the caller resets the blocks."""
        self.requests.clear()
        self._draining.clear()
        self._free_rows = list(range(self._max_num_seqs - 1, -1, -1))

    @property
    def num_free_rows(self) -> int:
        """So many more requests can start."""
        return len(self._free_rows)

    @property
    def blocks_are_due(self) -> bool:
        """Whether blocks come back as soon as the steps in flight are done."""
        return any(holder is not None for _, _, holder in self._draining)

    def start(self, request: Request) -> None:
        """Give a request that holds its blocks a row."""
        request.row = self._free_rows.pop()
        request.admitted_at = request.admitted_at or time.monotonic()
        request.status = Status.RUNNING
        insort(self.requests, request, key=self._policy.running_key)

    def preempt(self, request: Request) -> None:
        """Send a request back to compute its tokens again later.

        It keeps its tokens, and those in flight that are still to arrive.
        """
        self.requests.remove(request)
        self._blocks.release(request)
        self._give_back_row(request, holder=None)
        request.status = Status.WAITING
        request.num_computed_tokens = 0
        request.num_preemptions += 1

    def drop_finished(self, finished: list[Request]) -> None:
        """Let go of requests whose status became FINISHED."""
        self.requests = [r for r in self.requests if r.status is Status.RUNNING]
        for request in finished:
            if request.last_step <= self.done_step:
                self._blocks.release(request)
            self._give_back_row(request, holder=request)

    def step_done(self, done_step: int) -> None:
        """Take back what only waited for this step."""
        self.done_step = done_step
        if not self._draining:
            return
        waiting = []
        for last_step, row, holder in self._draining:
            if last_step > done_step:
                waiting.append((last_step, row, holder))
                continue
            self._free_rows.append(row)
            if holder is not None:
                self._blocks.release(holder)
        self._draining = waiting

    def _give_back_row(self, request: Request, holder: Request | None) -> None:
        if request.last_step <= self.done_step:
            self._free_rows.append(request.row)
        else:
            self._draining.append((request.last_step, request.row, holder))
        request.row = -1

    def check_invariants(self) -> None:
        """Check that rows and blocks belong to those who claim them.

        Raises:
            InvariantViolation: they do not.
        """
        keys = [self._policy.running_key(request) for request in self.requests]
        if keys != sorted(keys):
            raise InvariantViolation("running requests are out of policy order")
        rows = [r.row for r in self.requests] + [row for _, row, _ in self._draining]
        if sorted(rows + self._free_rows) != list(range(self._max_num_seqs)):
            raise InvariantViolation(f"rows {sorted(rows)} and free rows overlap or do not add up")
        drained = [holder for _, _, holder in self._draining if holder is not None]
        self._blocks.check_invariants(self.requests + drained)
