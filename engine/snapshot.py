"""What an engine was at, for whoever looks into its end: of requests only ids, lengths, blocks.

No text, no token and no sampling parameter is in it, so that it may be passed on.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from engine.outputs import EngineLoad
from engine.request import Request
from engine.step import StepPlan


class RequestSnapshot(msgspec.Struct):
    """A request that has not ended; lengths in tokens."""

    request_id: str
    num_prompt_tokens: int
    num_tokens: int
    """Prompt and output."""
    num_computed_tokens: int
    num_in_flight: int
    """Tokens that steps in flight sample."""
    num_blocks: int

    @classmethod
    def of(cls, request: Request) -> RequestSnapshot:
        """Take one."""
        return cls(
            request.request_id,
            request.num_prompt_tokens,
            len(request.token_ids),
            request.num_computed_tokens,
            request.num_in_flight,
            len(request.block_ids),
        )


class RowSnapshot(msgspec.Struct):
    """A row of a step: which tokens of which request it computes."""

    row: int
    request_id: str
    start: int
    """Position of its first token."""
    num_tokens: int


class StepSnapshot(msgspec.Struct):
    """A step's plan."""

    step: int
    num_tokens: int
    in_flight: bool
    """Whether it was launched and its result had not come."""
    rows: list[RowSnapshot]

    @classmethod
    def of(cls, plan: StepPlan, requests: Sequence[Request], in_flight: bool) -> StepSnapshot:
        """Take one; `requests` run parallel to the plan's rows."""
        rows = [
            RowSnapshot(row, request.request_id, start, count)
            for row, request, start, count in zip(
                plan.rows, requests, plan.starts, plan.num_tokens, strict=True
            )
        ]
        return cls(plan.step, plan.total_tokens, in_flight, rows)


class EngineSnapshot(msgspec.Struct):
    """An engine between or within two steps."""

    load: EngineLoad
    """Figures of the KV cache's pool are in it."""
    token_budget: int
    """Of a step; lower than configured after a step ran out of memory."""
    steps: list[StepSnapshot]
    """Those in flight, oldest first, or else the last one."""
    running: list[RequestSnapshot]
    waiting: list[RequestSnapshot]
