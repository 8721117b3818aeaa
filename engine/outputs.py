"""What the engine hands out: wire structs of a step, and the results that users see."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import msgspec

from engine.errors import InvalidRequest

FinishReason = Literal["stop", "length", "abort", "error"]
"""Why a sequence ended; the first two are OpenAI's."""


class TokenLogprobs(msgspec.Struct, array_like=True):
    """Log-probabilities at one position.

    `token_ids[0]` is the sampled (or prompt) token; the rest are the likeliest, best first.
    """

    token_ids: list[int]
    logprobs: list[float]
    rank: int
    """Rank of `token_ids[0]` among the whole vocabulary; 1 is the likeliest."""


class TokenDelta(msgspec.Struct, array_like=True, omit_defaults=True):
    """What one step added to one request; crosses processes, so fields are only ever appended."""

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    """The stop token that ended it, when that was not the model's own end-of-sequence token."""
    logprobs: list[TokenLogprobs] | None = None
    """One entry for each of `token_ids`, when asked for."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """For prompt positions 1 …, in order, in as many pieces as the prefill had chunks."""
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache; set on the first delta."""
    error: str | None = None
    """A sentence for the client when `finish_reason` is `error`."""
    refused: bool = False
    """The error is the request's own: it can never run on this engine."""
    param: str | None = None
    """The field that is to blame, when `refused`."""
    pooled: bytes | None = None
    """What a request that is pooled ends with: float32 [hidden size], little-endian, as the model
    has it."""
    queued_s: float = 0.0
    """Seconds from the request's arrival at the engine to its first admission to the batch; set on
    the delta of its first token, or of its vector."""
    prefill_s: float = 0.0
    """Seconds from there to that token or vector; set likewise."""


def failed(request_id: str, error: str) -> TokenDelta:
    """Tells that a request has ended with an error of the engine's, a sentence for the client."""
    return TokenDelta(request_id, [], finish_reason="error", error=error)


def refusal(request_id: str, error: InvalidRequest) -> TokenDelta:
    """Tells that a request cannot be served as it is."""
    return TokenDelta(request_id, [], "error", error=error.message, refused=True, param=error.param)


class EngineLoad(msgspec.Struct, array_like=True):
    """The engine's load after a step; routers and metrics read it."""

    num_running: int = 0
    num_waiting: int = 0
    running_tokens: int = 0
    """Tokens of KV cache that running requests hold."""
    waiting_tokens: int = 0
    """Prompt tokens not yet computed, or lost by a preemption, of waiting and running requests."""
    free_blocks: int = 0
    """Blocks that a new request could take, cached ones included."""
    total_blocks: int = 0
    step: int = 0
    """Steps done so far; a value that stands still while requests run means a hang."""
    num_preemptions: int = 0
    prefix_queries: int = 0
    """Prompt tokens looked up in the prefix cache so far."""
    prefix_hits: int = 0
    """Prompt tokens found there so far."""
    block_size: int = 0
    """Tokens in a block; 0 when nothing has been reported."""
    num_received: int = 0
    """Requests that had reached the engine, refused ones included, when this was its load."""
    prefilled_tokens: int = 0
    """Prompt tokens computed so far, or found in the prefix cache; those of preempted requests each
    time."""
    overdue: bool = False
    """A step lasts longer than any should. Known only while it runs, so by who sends the load."""
    generated_tokens: int = 0
    """Tokens generated so far."""
    idle_s: float = 0.0
    """Seconds so far in which the device had nothing to do; see `IdleTime`."""
    new_requests: int = 0
    """Of those in `num_received`, how many were taken and not sent to an engine before."""
    new_tokens: int = 0
    """Their prompt tokens."""


@dataclass(slots=True)
class Logprob:
    """Log-probability of one token, its rank (1 is the likeliest) and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        """Whether the completion has ended."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """When a request was where, in seconds of `time.monotonic`, and for how long in its engine."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    queued_s: float = 0.0
    """See `TokenDelta`; of the completion that began first, like the next."""
    prefill_s: float = 0.0


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its completions; `text`, `tokens` and `finished` speak of the first one."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None

    @property
    def text(self) -> str:
        """Text of the first completion."""
        return self.outputs[0].text

    @property
    def tokens(self) -> list[int]:
        """Token ids of the first completion."""
        return self.outputs[0].token_ids

    @property
    def finished(self) -> bool:
        """Whether every completion has ended."""
        return all(output.finished for output in self.outputs)


@dataclass(slots=True)
class EmbeddingOutput:
    """The embedding of a prompt."""

    embedding: list[float]


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """A prompt and its embedding."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: EmbeddingOutput
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None
    finished: bool = True
