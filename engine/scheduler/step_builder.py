"""Puts the plan of one step together."""

from __future__ import annotations

from dataclasses import dataclass

from engine.request import Request
from engine.step import NewRow, StepPlan


@dataclass(slots=True)
class ScheduledStep:
    """A plan and whom it concerns, kept until its result is in."""

    plan: StepPlan
    requests: list[Request]
    """Parallel to `plan.rows`."""
    sampled: list[Request]
    """Those that sample, in the plan's order."""


class StepBuilder:
    """Collects rows within a token budget; rows of one token go first in the plan."""

    def __init__(self, step: int, token_budget: int) -> None:
        self.plan = StepPlan(step)
        self.room: int | None = None
        """Tokens of prompts that it had better not exceed; None before the first prompt."""
        self.budget = token_budget
        """Tokens that the step may still compute."""
        self._decodes: list[Request] = []
        self._prefills: list[tuple[Request, int, int, bool]] = []

    @property
    def is_empty(self) -> bool:
        """Whether no row computes anything."""
        return not self._decodes and not self._prefills

    def add(self, request: Request, count: int) -> None:
        """Compute the next `count` tokens of a running request that has blocks for them."""
        plan, row, start = self.plan, request.row, request.num_computed_tokens
        end = start + count
        sample = end == len(request.token_ids) + request.num_in_flight
        if not request.num_in_flight:  # else the one input is a token that the device sampled
            plan.input_ids[row] = request.token_ids[start:end]
        if count == 1:
            plan.starts.append(start)
            plan.samples.append(sample)
            self._decodes.append(request)
        else:
            self._prefills.append((request, start, count, sample))
        request.num_computed_tokens = end
        request.num_in_flight += sample
        request.last_step = plan.step
        self.budget -= count

    def add_new_row(self, request: Request) -> None:
        """Tell the runner of a request that was just given a row and blocks."""
        self.plan.new_rows.append(
            NewRow(
                request.row,
                request.request_id,
                request.params,
                request.token_ids.copy(),
                request.num_prompt_tokens,
                request.pooling,
            )
        )
        self.plan.new_blocks[request.row] = (0, request.block_ids.copy())

    def add_blocks(self, request: Request, blocks: list[int]) -> None:
        """Tell the runner of blocks just appended to a request's table."""
        self.plan.new_blocks[request.row] = (len(request.block_ids) - len(blocks), blocks)

    def build(self) -> ScheduledStep:
        """The step, complete."""
        plan, requests = self.plan, self._decodes
        plan.num_tokens = [1] * len(requests)
        for request, start, count, sample in self._prefills:
            requests.append(request)
            plan.starts.append(start)
            plan.num_tokens.append(count)
            plan.samples.append(sample)
        plan.rows = [request.row for request in requests]
        sampled = [r for r, sample in zip(requests, plan.samples, strict=True) if sample]
        return ScheduledStep(plan, requests, sampled)
