"""One prompt of an offline call: its requests, and what has come back of them."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from engine.embedding import Pooling
from engine.errors import InvalidRequest
from engine.inputs import (
    Prompt,
    check_token_options,
    fan_out,
    prompt_text,
    spell_bad_words,
    tokenize_prompt,
)
from engine.output_processor import OutputProcessor, TextDelta
from engine.outputs import RequestMetrics, RequestOutput, TokenDelta
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer


@dataclass(slots=True)
class Job:
    """A prompt and its `n` completions."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    """As the caller gave them, for all completions."""
    requests: dict[str, EngineRequest]
    """Request id → request, in the completions' order."""
    processors: dict[str, OutputProcessor]
    metrics: RequestMetrics
    pooled: bytes = b""
    """The vector of a prompt that was to be pooled, once it has come; see `TokenDelta.pooled`."""

    @classmethod
    def build(
        cls,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        priority: int,
        tokenizer: Tokenizer | None,
        max_model_len: int,
        vocab_size: int,
        rng: random.Random | None = None,
        pooling: Pooling | None = None,
    ) -> Job:
        """Check and tokenize a prompt; `rng` draws the seed when `params` has none.

        With `pooling` the prompt is to be pooled, and `params` are `POOLED_PARAMS`.

        Raises:
            InvalidRequest: the prompt or an option cannot be served.
        """
        ids = tokenize_prompt(prompt, tokenizer, max_model_len, vocab_size, pooling is None)
        params = spell_bad_words(params, tokenizer)
        check_token_options(params, vocab_size)
        if params.structured_outputs is not None and tokenizer is None:
            param = params.structured_outputs.param
            raise InvalidRequest(f"{param} needs a tokenizer, and the model has none.", param)
        if params.stop and tokenizer is None:
            raise InvalidRequest("stop strings need a tokenizer, and the model has none.", "stop")
        parts = fan_out(params, request_id, rng)
        return cls(
            request_id,
            prompt_text(prompt),
            ids,
            params,
            {rid: EngineRequest(rid, ids, each, priority, pooling=pooling) for rid, each in parts},
            {
                rid: OutputProcessor(tokenizer if each.detokenize else None, each, ids, index)
                for index, (rid, each) in enumerate(parts)
            },
            RequestMetrics(time.monotonic()),
        )

    @property
    def finished(self) -> bool:
        """Whether every completion has ended."""
        return all(processor.finished for processor in self.processors.values())

    def push(self, delta: TokenDelta) -> TextDelta:
        """Take what a step added to one of the requests."""
        text = self.processors[delta.request_id].push(delta)
        if delta.pooled is not None:
            self.pooled = delta.pooled
        if self.metrics.first_token_time is None and delta.token_ids:
            self.metrics.first_token_time = time.monotonic()
        if delta.prefill_s and not self.metrics.prefill_s:
            self.metrics.queued_s, self.metrics.prefill_s = delta.queued_s, delta.prefill_s
        if text.finish_reason is not None and self.finished:
            self.metrics.finished_time = time.monotonic()
        return text

    def output(self) -> RequestOutput:
        """What has come back so far."""
        first = next(iter(self.processors.values()))
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[processor.result() for processor in self.processors.values()],
            prompt_logprobs=first.prompt_logprobs,
            num_cached_tokens=first.num_cached_tokens,
            metrics=self.metrics,
        )
