"""Executes planned steps: input tensors, forward pass, sampling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from engine.attention.backend import AttentionBackend
from engine.models.causal_lm import CausalLM
from engine.outputs import TokenLogprobs
from engine.runner.input_batch import InputBatch, StepInputs
from engine.sampling.logprobs import prompt_logprobs
from engine.sampling.sampler import Sampler, SamplerOutput
from engine.step import NewRow, StepPlan, StepResult

PROMPT_LOGPROBS_CHUNK = 128
"""Prompt positions whose logits exist at a time, which bounds the memory of `prompt_logprobs`."""


@dataclass(slots=True)
class PendingStep:
    """A launched step whose sampled tokens may still be on the device."""

    output: SamplerOutput | None
    prompt_logprobs: dict[int, list[TokenLogprobs]]

    def result(self) -> StepResult:
        """Wait for the step and bring its tokens to the host."""
        if self.output is None:
            return StepResult([], prompt_logprobs=self.prompt_logprobs)
        logprobs = self.output.host_logprobs()
        return StepResult(self.output.token_ids.tolist(), logprobs, self.prompt_logprobs)


class ModelRunner:
    """Owns model, KV cache and row state of one device."""

    def __init__(
        self,
        model: CausalLM,
        backend: AttentionBackend,
        kv_caches: list[torch.Tensor],
        batch: InputBatch,
        sampler: Sampler,
    ) -> None:
        self.model = model
        self.backend = backend
        self.kv_caches = kv_caches
        self.batch = batch
        self.sampler = sampler
        self._scored_prompts: dict[int, NewRow] = {}

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> PendingStep:
        """Launch a step; the caller collects `result()` when it needs the tokens."""
        for new_row in plan.new_rows:
            self._admit(new_row)
        inputs = self.batch.build(plan)
        metadata = self.backend.prepare(inputs.attention)
        hidden = self.model(
            inputs.token_ids, inputs.positions, self.kv_caches, self.backend, metadata
        )
        scored = self._score_prompts(plan, hidden) if self._scored_prompts else {}
        output = self._sample(inputs, hidden) if inputs.sample_rows else None
        return PendingStep(output, scored)

    def _admit(self, new_row: NewRow) -> None:
        self.sampler.add_row(new_row)
        self._scored_prompts.pop(new_row.row, None)
        if new_row.params.prompt_logprobs is not None:
            self._scored_prompts[new_row.row] = new_row

    def _sample(self, inputs: StepInputs, hidden: torch.Tensor) -> SamplerOutput:
        if len(inputs.sample_indices) < len(hidden):
            hidden = hidden[inputs.sample_indices]
        logits = self.model.compute_logits(hidden)
        output = self.sampler.sample(logits, inputs.sample_rows, inputs.sample_positions)
        self.batch.store_sampled(inputs.sample_rows, output.token_ids)
        return output

    def _score_prompts(
        self, plan: StepPlan, hidden: torch.Tensor
    ) -> dict[int, list[TokenLogprobs]]:
        scored: dict[int, list[TokenLogprobs]] = {}
        offset = 0
        for row, start, count in zip(plan.rows, plan.starts, plan.num_tokens, strict=True):
            asked = self._scored_prompts.get(row)
            if asked is not None:
                targets = asked.token_ids[
                    start + 1 : min(start + count + 1, asked.num_prompt_tokens)
                ]
                pieces = self._score(hidden[offset:], targets, asked.params.prompt_logprobs or 0)
                scored[row] = [entry for piece in pieces for entry in piece]
            offset += count
        return scored

    def _score(
        self, hidden: torch.Tensor, targets: list[int], k: int
    ) -> Iterator[list[TokenLogprobs]]:
        for first in range(0, len(targets), PROMPT_LOGPROBS_CHUNK):
            chunk = targets[first : first + PROMPT_LOGPROBS_CHUNK]
            logits = self.model.compute_logits(hidden[first : first + len(chunk)])
            yield prompt_logprobs(logits, torch.tensor(chunk, device=logits.device), k)
