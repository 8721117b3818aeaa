"""Executes planned steps: input tensors, forward pass, sampling."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from engine.attention.backend import AttentionBackend
from engine.models.causal_lm import CausalLM
from engine.outputs import TokenLogprobs
from engine.runner.cuda_graphs import StepGraphs
from engine.runner.input_batch import MAX_PADDED_ROWS, InputBatch, StepInputs
from engine.runner.pooling import PooledRows, Pooler
from engine.sampling.logprobs import prompt_logprobs, rows_at_a_time
from engine.sampling.sampler import Sampler, SamplerOutput
from engine.sampling.token_masks import TokenMasks
from engine.step import NewRow, StepPlan, StepResult
from engine.step_times import UNKNOWN_TIMES, StepTimes


@dataclass(slots=True)
class PendingStep:
    """A launched step whose sampled tokens may still be on the device."""

    prompt_logprobs: dict[int, list[TokenLogprobs]]
    output: SamplerOutput | None = None
    pooled: PooledRows | None = None
    tokens: torch.Tensor | None = None
    """Sampled tokens on the host, once `done` has happened; int64 [samples]."""
    done: torch.cuda.Event | None = None
    """None on CPU."""
    waiting_sample: Callable[[PendingStep, TokenMasks | None], None] | None = None
    """Launches the sampling of a step that waits for its masks."""
    prepare_s: float = 0.0
    launch_s: float = 0.0
    timers: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
    """Before the first and after the last kernel, when profiling."""

    def sample(self, masks: TokenMasks | None) -> None:
        """Launch the sampling of a step that waits for its masks, before any other step."""
        began = time.perf_counter()
        if self.waiting_sample is not None:
            self.waiting_sample(self, masks)
        self.launch_s += time.perf_counter() - began

    def result(self) -> StepResult:
        """Wait for the step and bring its tokens to the host."""
        if self.output is None or self.tokens is None:
            return StepResult([], prompt_logprobs=self.prompt_logprobs)
        if self.done is not None:
            self.done.synchronize()
        logprobs = self.output.host_logprobs()
        pooled = {} if self.pooled is None else self.pooled.to_host()
        return StepResult(self.tokens.tolist(), logprobs, self.prompt_logprobs, pooled)


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
        self.step_times = UNKNOWN_TIMES
        self._cuda = batch.device.type == "cuda"
        self._graphs: list[StepGraphs] = []
        self._scored_prompts: dict[int, NewRow] = {}
        self._pooler = Pooler()

    @torch.inference_mode()
    def capture(self, decode_sizes: list[int], padded_sizes: list[int]) -> None:
        """Capture the forward pass in the null block.

        Args:
            decode_sizes: rows of the batches that only decode.
            padded_sizes: tokens of other batches; none if the backend does not capture those.
        """
        batch, agree = self.batch, self._agree
        kinds = [
            StepGraphs(decode_sizes, _num_decodes, batch.build_decode, self._forward, agree),
            StepGraphs(
                padded_sizes, self._num_padded, batch.build_padded, self._forward_padded, agree
            ),
        ]
        pool = torch.cuda.graph_pool_handle()
        for graphs in kinds:
            graphs.capture(pool)
        self._graphs = kinds

    def time_steps(self, large: StepPlan) -> None:
        """Set `step_times` from the captured graphs and a step that is too large for any.

        The ranks of a model do this together, and keep the times of the slowest.
        """
        decode, padded = self._graphs
        token_s = self._agree(self._time(large)) / large.total_tokens
        self.step_times = StepTimes(decode.seconds, padded.seconds, token_s, MAX_PADDED_ROWS)

    def _time(self, plan: StepPlan) -> float:
        """Seconds of a step without a graph: the shorter of two."""
        times = []
        for _ in range(2):
            torch.cuda.synchronize()
            began = time.perf_counter()
            self.execute(plan, eager=True).result()
            times.append(time.perf_counter() - began)
        return min(times)

    def _agree(self, seconds: float) -> float:
        """The time of the slowest rank."""
        return self.model.group.most(seconds, device=self.batch.device)

    def release_graphs(self) -> None:
        """Let go of what `capture` captured; steps do without."""
        for graphs in self._graphs:
            graphs.release()
        self._graphs = []

    @torch.inference_mode()
    def execute(self, plan: StepPlan, *, eager: bool = False) -> PendingStep:
        """Launch a step; the caller collects `result()` when it needs the tokens.

        Args:
            plan: of the step.
            eager: replay no graph.
        """
        began = time.perf_counter()
        for new_row in plan.new_rows:
            self._admit(new_row)
        wants_all = self._wants_all(plan)
        graphs, size = (None, 0) if eager else self._graph_for(plan)
        inputs = self.batch.build(plan) if graphs is None else graphs.build(plan, size)
        prepared = time.perf_counter()
        first = self._event(timed=True) if self.profiling and self._cuda else None
        if graphs is not None:
            hidden = graphs.replay(size)
        elif wants_all:
            hidden = self._forward(inputs)
        else:
            hidden = self._forward_samples(inputs)
        scored: dict[int, list[TokenLogprobs]] = {}
        if wants_all:
            scored = self._score_prompts(plan, hidden)
            self._pooler.accumulate(plan, hidden)
            hidden = hidden[inputs.sample_indices]
        pending = PendingStep(scored, prepare_s=prepared - began)
        sample = partial(self._sample, inputs, hidden[: len(inputs.samples.rows)], first)
        if plan.masked:
            pending.waiting_sample = sample
        else:
            sample(pending)
        pending.launch_s += time.perf_counter() - prepared
        return pending

    def _graph_for(self, plan: StepPlan) -> tuple[StepGraphs | None, int]:
        for graphs in self._graphs:
            size = graphs.size_for(plan)
            if size is not None:
                return graphs, size
        return None, 0

    def _wants_all(self, plan: StepPlan) -> bool:
        """Whether hidden states are wanted of all tokens, not only of those that samples follow."""
        asked = self._scored_prompts
        scores = bool(asked) and not asked.keys().isdisjoint(plan.rows)  # some may be aborted
        return scores or self._pooler.needs_all(plan)

    def _num_padded(self, plan: StepPlan) -> int | None:
        """Tokens of a plan that a padded batch can hold."""
        if self._wants_all(plan) or len(plan.rows) > MAX_PADDED_ROWS:
            return None
        return plan.total_tokens

    def _admit(self, new_row: NewRow) -> None:
        self.sampler.add_row(new_row)
        self._pooler.add_row(new_row)
        self._scored_prompts.pop(new_row.row, None)
        if new_row.params.prompt_logprobs is not None:
            self._scored_prompts[new_row.row] = new_row

    def _event(self, timed: bool = False) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=timed)
        event.record()
        return event

    def _forward_samples(self, inputs: StepInputs) -> torch.Tensor:
        """Hidden states of the tokens that samples follow only, or of some other one."""
        if len(inputs.samples.rows) == len(inputs.positions):
            return self._forward(inputs)
        if not inputs.samples.rows:
            return self._forward(inputs, inputs.positions.new_zeros(1))
        return self._forward(inputs, inputs.sample_indices)

    def _forward_padded(self, inputs: StepInputs) -> torch.Tensor:
        return self._forward(inputs, inputs.sample_indices)

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

    @torch.inference_mode()
    def _sample(
        self,
        inputs: StepInputs,
        hidden: torch.Tensor,
        first: torch.cuda.Event | None,
        pending: PendingStep,
        masks: TokenMasks | None = None,
    ) -> None:
        """Launch the sampling of a step, whose first kernel came after `first`."""
        if inputs.samples.rows:
            pending.pooled = self._pooler.pool(inputs.samples, hidden)
            logits = self.model.compute_logits(hidden)
            output = pending.output = self.sampler.sample(logits, inputs.samples, masks)
            self.batch.store_sampled(inputs, output.token_ids)
            pending.tokens = output.token_ids
            if self._cuda:
                self._fetch(pending, output)
        if first is not None:
            pending.timers = first, self._event(timed=True)

    def _fetch(self, pending: PendingStep, output: SamplerOutput) -> None:
        """Copy what was sampled to the host: later, it would queue behind the next step."""
        if output.logprobs is not None:
            output.logprobs = output.logprobs.to_pinned()
        if pending.pooled is not None:
            pending.pooled = pending.pooled.to_pinned()
        pending.tokens = torch.empty(len(output.token_ids), dtype=torch.int64, pin_memory=True)
        pending.tokens.copy_(output.token_ids, non_blocking=True)
        pending.done = self._event()

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


def _num_decodes(plan: StepPlan) -> int | None:
    """Rows of a plan whose rows all compute and sample one token."""
    rows = len(plan.rows)
    return rows if plan.total_tokens == rows and all(plan.samples) else None
