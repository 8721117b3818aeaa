"""A request as it crosses processes, and as the scheduler tracks it."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from engine.embedding import Pooling
from engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from engine.structured_outputs.grammar import Matcher


class EngineRequest(msgspec.Struct, array_like=True, kw_only=False):
    """One sequence to generate; crosses processes, so fields are only ever appended.

    `params.n` is 1 and `params.seed` is set: whoever builds the request fans out `n` and draws the
    seed, so that a resumed request draws the same noise.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    arrival_time: float = msgspec.field(default_factory=time.time)
    cache_salt: str | None = None
    """Requests share cached blocks only under the same salt."""
    output_token_ids: list[int] = msgspec.field(default_factory=list)
    """Tokens that another engine generated before it was lost; this engine goes on after them."""
    pooling: Pooling | None = None
    """Asks for the prompt's vector in place of tokens; `params` then are `POOLED_PARAMS`."""
    resumed: bool = False
    """Whether it has been sent to an engine before, with or without a token of it; so it is no new
    traffic."""

    @property
    def computes_whole_prompt(self) -> bool:
        """Whether it must not start from cached blocks, of which no hidden states are left."""
        return self.params.prompt_logprobs is not None or self.pooling == "mean"


class Status(enum.Enum):
    """Where a request stands in the scheduler."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(slots=True, eq=False)
class Request:
    """The scheduler's state of one request."""

    request_id: str
    token_ids: list[int]
    """Prompt and output tokens known on the host."""
    num_prompt_tokens: int
    params: SamplingParams
    priority: int = 0
    arrival_time: float = 0.0
    cache_salt: str | None = None
    pooling: Pooling | None = None
    """How its hidden states become the vector that it ends with, if it is to generate nothing."""
    computes_whole_prompt: bool = False
    """Whether it must not start from cached blocks."""
    status: Status = Status.WAITING
    row: int = -1
    """Row in the runner's batch while running."""
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    """Hashes of the full blocks of `token_ids`, extended as tokens come."""
    num_computed_tokens: int = 0
    """Tokens whose keys and values are in the cache, those of steps in flight included."""
    num_registered_blocks: int = 0
    """Leading blocks that were offered to the prefix cache."""
    last_step: int = 0
    """Newest step that computes tokens of the request; 0 before the first."""
    num_in_flight: int = 0
    """Sampled tokens that the device has and the host does not yet know."""
    num_cached_tokens: int = 0
    """Prompt tokens that the first admission found in the prefix cache."""
    start_told: bool = False
    """Whether a delta has carried `num_cached_tokens`, and how long the start took."""
    num_preemptions: int = 0
    ran_out_of_memory: bool = False
    """Whether it was in a step that did, and is computed anew."""
    num_prompt_logprobs: int = 0
    """Prompt positions whose log-probabilities were handed out."""
    max_total_tokens: int = 0
    """Length at which the request ends for `length`."""
    matcher: Matcher | None = None
    """What its output follows, if it is to be of some form."""
    queued_since: float = field(default_factory=time.monotonic)
    received_at: float = field(default_factory=time.monotonic)
    admitted_at: float = 0.0
    """When it was first admitted to the batch; 0 before."""

    @classmethod
    def from_wire(cls, wire: EngineRequest, max_model_len: int) -> Request:
        """Track a request that arrived; `max_model_len` caps its length."""
        num_prompt = len(wire.prompt_token_ids)
        limit = max_model_len + (wire.pooling is not None)  # a vector takes no room
        if wire.params.max_tokens is not None:
            # With one token comes what was computed of the prompt, even if none is wanted.
            limit = min(limit, num_prompt + max(1, wire.params.max_tokens))
        return cls(
            request_id=wire.request_id,
            token_ids=wire.prompt_token_ids + wire.output_token_ids,
            num_prompt_tokens=num_prompt,
            params=wire.params,
            priority=wire.priority,
            arrival_time=wire.arrival_time,
            cache_salt=wire.cache_salt,
            pooling=wire.pooling,
            computes_whole_prompt=wire.computes_whole_prompt,
            max_total_tokens=limit,
        )

    @property
    def num_tokens(self) -> int:
        """Tokens so far, those in flight included."""
        return len(self.token_ids) + self.num_in_flight

    @property
    def decodes(self) -> bool:
        """Whether it may generate more than one token."""
        return self.num_prompt_tokens + 1 < self.max_total_tokens

    @property
    def num_output_tokens(self) -> int:
        """Output tokens that the host knows."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def finished(self) -> bool:
        """Whether the request has ended."""
        return self.status is Status.FINISHED
