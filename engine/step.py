"""The plan of one step and its result: plain data between scheduler and runner."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.embedding import Pooling
from engine.outputs import TokenLogprobs
from engine.sampling_params import SamplingParams


@dataclass(slots=True)
class NewRow:
    """A request that takes a row of the batch with this step (first or after a preemption)."""

    row: int
    request_id: str
    params: SamplingParams
    token_ids: list[int]
    """Prompt and output tokens known when the row was taken; not to be changed."""
    num_prompt_tokens: int
    pooling: Pooling | None = None
    """Gives a vector where others sample their first token."""


@dataclass(slots=True)
class StepPlan:
    """Which tokens of which rows a step computes.

    `rows`, `starts`, `num_tokens` and `samples` run in parallel. Rows that compute one token come
    first, so that attention can treat them as one decode batch.
    """

    step: int
    rows: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    """Position of the first token computed; keys before it are in the cache."""
    num_tokens: list[int] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)
    """Whether the row's last token is its newest, so that the next one is sampled."""
    input_ids: dict[int, list[int]] = field(default_factory=dict)
    """Row → its input tokens. A row that is missing takes the token it sampled last, which may
    not have left the device."""
    new_rows: list[NewRow] = field(default_factory=list)
    new_blocks: dict[int, tuple[int, list[int]]] = field(default_factory=dict)
    """Row → (index in its block table, block ids to write from there)."""
    num_preempted: int = 0
    masked: list[int] = field(default_factory=list)
    """Places among the rows that sample whose tokens follow a grammar. If there are any, the step
    is sampled when its masks are there: they depend on the tokens of the step before."""

    @property
    def total_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(self.num_tokens)


@dataclass(slots=True)
class StepResult:
    """What a step produced; `token_ids` belongs to the plan's sampling rows, in their order."""

    token_ids: list[int]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    """Row → log-probabilities of its sampled token, for rows that asked."""
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    """Row → one entry for each position computed whose next token is a prompt token."""
    pooled: dict[int, bytes] = field(default_factory=dict)
    """Place among the rows that sample → its vector; see `TokenDelta.pooled`. The token that was
    sampled there means nothing."""
