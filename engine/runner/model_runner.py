"""Executes planned steps: input tensors, forward pass, sampling."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from engine.attention.backend import AttentionBackend
from engine.models.causal_lm import CausalLM
from engine.outputs import TokenLogprobs
from engine.runner.cuda_graphs import DecodeGraphs
from engine.runner.input_batch import InputBatch, StepInputs
from engine.sampling.logprobs import prompt_logprobs, rows_at_a_time
from engine.sampling.sampler import Sampler, SamplerOutput
from engine.step import NewRow, StepPlan, StepResult


@dataclass(slots=True)
class PendingStep:
    """A launched step whose sampled tokens may still be on the device."""

    output: SamplerOutput | None
    prompt_logprobs: dict[int, list[TokenLogprobs]]
    tokens: torch.Tensor | None
    """Sampled tokens on the host, once `done` has happened; int64 [samples]."""
    done: torch.cuda.Event | None
    """None on CPU."""
    prepare_s: float = 0.0
    launch_s: float = 0.0
    timers: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
    """Before the first and after the last kernel, when profiling."""

    def result(self) -> StepResult:
        """Wait for the step and bring its tokens to the host."""
        if self.output is None or self.tokens is None:
            return StepResult([], prompt_logprobs=self.prompt_logprobs)
        if self.done is not None:
            self.done.synchronize()
        logprobs = self.output.host_logprobs()
        return StepResult(self.tokens.tolist(), logprobs, self.prompt_logprobs)


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
        self.profiling = False
        """Whether steps carry `timers`."""
        self._cuda = batch.device.type == "cuda"
        self._graphs: DecodeGraphs | None = None
        self._scored_prompts: dict[int, NewRow] = {}

    @torch.inference_mode()
    def capture(self, sizes: list[int]) -> None:
        """Capture the decode step at these batch sizes, in the null block."""
        graphs = DecodeGraphs(sizes, self._forward)
        graphs.capture(lambda size: self.batch.build_decode(StepPlan(0), size))
        self._graphs = graphs

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> PendingStep:
        """Launch a step; the caller collects `result()` when it needs the tokens."""
        began = time.perf_counter()
        for new_row in plan.new_rows:
            self._admit(new_row)
        size = self._graphs.size_for(plan) if self._graphs is not None else None
        inputs = self.batch.build(plan) if size is None else self.batch.build_decode(plan, size)
        prepared = time.perf_counter()
        first = self._event(timed=True) if self.profiling and self._cuda else None
        if size is None or self._graphs is None:
            hidden = self._forward(inputs, self._wanted(inputs))
        else:
            hidden = self._graphs.replay(size)
        scored = self._score_prompts(plan, hidden) if self._scored_prompts else {}
        pending = self._sample(inputs, hidden, scored)
        if first is not None:
            pending.timers = first, self._event(timed=True)
        pending.prepare_s, pending.launch_s = prepared - began, time.perf_counter() - prepared
        return pending

    def _admit(self, new_row: NewRow) -> None:
        self.sampler.add_row(new_row)
        self._scored_prompts.pop(new_row.row, None)
        if new_row.params.prompt_logprobs is not None:
            self._scored_prompts[new_row.row] = new_row

    def _event(self, timed: bool = False) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=timed)
        event.record()
        return event

    def _wanted(self, inputs: StepInputs) -> torch.Tensor | None:
        """The tokens whose hidden states the step needs, for `CausalLM.forward`."""
        if self._scored_prompts or len(inputs.samples.rows) == len(inputs.positions):
            return None
        return inputs.sample_indices if inputs.samples.rows else inputs.positions.new_zeros(1)

    def _forward(self, inputs: StepInputs, wanted: torch.Tensor | None = None) -> torch.Tensor:
        hidden: torch.Tensor = self.model(
            self.batch.input_tokens(inputs),
            inputs.positions,
            inputs.attention.slot_mapping,
            self.kv_caches,
            self.backend,
            self.backend.prepare(inputs.attention),
            wanted,
        )
        return hidden

    def _sample(
        self,
        inputs: StepInputs,
        hidden: torch.Tensor,
        scored: dict[int, list[TokenLogprobs]],
    ) -> PendingStep:
        if not inputs.samples.rows:
            return PendingStep(None, scored, None, None)
        if len(inputs.samples.rows) < len(hidden):
            hidden = hidden[inputs.sample_indices]
        logits = self.model.compute_logits(hidden)
        output = self.sampler.sample(logits, inputs.samples)
        self.batch.store_sampled(inputs, output.token_ids)
        if not self._cuda:
            return PendingStep(output, scored, output.token_ids, None)
        # Fetched later, they would queue behind the step that is launched in between.
        if output.logprobs is not None:
            output.logprobs = output.logprobs.to_pinned()
        tokens = torch.empty(len(output.token_ids), dtype=torch.int64, pin_memory=True)
        tokens.copy_(output.token_ids, non_blocking=True)
        return PendingStep(output, scored, tokens, self._event())

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
                if start + count >= asked.num_prompt_tokens:
                    del self._scored_prompts[row]
            offset += count
        return scored

    def _score(
        self, hidden: torch.Tensor, targets: list[int], k: int
    ) -> Iterator[list[TokenLogprobs]]:
        size = rows_at_a_time(self.model.config.vocab_size)
        for first in range(0, len(targets), size):
            chunk = targets[first : first + size]
            logits = self.model.compute_logits(hidden[first : first + len(chunk)])
            yield prompt_logprobs(logits, torch.tensor(chunk, device=logits.device), k)
