"""A runner that computes nothing: its tokens are the prompt's, its steps end by the clock."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.serving.journal import Admission, JournalWriter
from engine.outputs import TokenLogprobs
from engine.step import NewRow, StepPlan, StepResult

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class FakeStep:
    """A launched step; its tokens are there when it is due."""

    due: float
    """Seconds of `time.monotonic()`."""
    token_ids: list[int]
    logprobs: dict[int, TokenLogprobs]
    joined: list[tuple[str, int]]
    """Requests that get a token and got none in the step before, and what number it has."""
    admitted: Sequence[Admission]
    journal: JournalWriter | None
    prepare_s: float = 0.0
    launch_s: float = 0.0
    timers: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def result(self) -> StepResult:
        """Wait until the step is due, and note it in the journal."""
        time.sleep(max(self.due - time.monotonic(), 0.0))
        if self.journal is not None:
            self.journal.write(self.due, time.thread_time(), self.joined, self.admitted)
        return StepResult(self.token_ids, self.logprobs)


@dataclass(slots=True)
class _Row:
    """A request: its output token number i is `prompt[i % len(prompt)]`."""

    request_id: str
    prompt: list[int]
    num_logprobs: int | None = None
    """How many likeliest tokens to tell of beside the sampled one, if asked for any."""
    last_step: int = -1
    """Newest step that gave it a token."""

    def token(self, position: int) -> int:
        """Output token of this number."""
        return self.prompt[position % len(self.prompt)]

    def logprobs(self, position: int) -> TokenLogprobs:
        """Made up: it was the likeliest, and the next ones are those of the output."""
        count = self.num_logprobs or 0
        tokens = [self.token(position), *(self.token(position + i) for i in range(count))]
        return TokenLogprobs(tokens, [-0.25 * (1 + i) for i in (0, *range(count))], 1)


class FakeRunner:
    """Stands in for `ModelRunner`.

    Output repeats the prompt, so that a client can check every character, across preemptions too.

    A step lasts `step_s`, and `token_s` more for each token of a prefill, on a device that begins
    the next launched step by itself: with one step ahead the host's work between two steps is
    hidden unless it takes longer than a step.

    Args:
        max_num_seqs: rows.
        step_s: seconds.
        token_s: seconds.
        journal: gets an account of the steps.
    """

    def __init__(
        self, max_num_seqs: int, step_s: float, token_s: float, journal: JournalWriter | None
    ) -> None:
        self.profiling = False
        self._rows = [_Row("", [])] * max_num_seqs
        self._step_s = step_s
        self._token_s = token_s
        self._journal = journal
        self._due = 0.0

    def execute(self, plan: StepPlan) -> FakeStep:
        """Launch a step."""
        for new_row in plan.new_rows:
            self._rows[new_row.row] = _Row(
                new_row.request_id,
                new_row.token_ids[: new_row.num_prompt_tokens],
                new_row.params.logprobs,
            )
        prefilled = sum(count for count in plan.num_tokens if count > 1)
        begin = max(self._due, time.monotonic())
        self._due = begin + self._step_s + self._token_s * prefilled
        step = FakeStep(self._due, [], {}, [], (), self._journal)
        self._sample(plan, step)
        if plan.new_rows:
            step.admitted = _admissions(plan)
        return step

    def _sample(self, plan: StepPlan, step: FakeStep) -> None:
        for index, start, count, samples in zip(
            plan.rows, plan.starts, plan.num_tokens, plan.samples, strict=True
        ):
            if not samples:
                continue
            row = self._rows[index]
            position = start + count - len(row.prompt)
            step.token_ids.append(row.token(position))
            if row.num_logprobs is not None:
                step.logprobs[index] = row.logprobs(position)
            if row.last_step != plan.step - 1:
                step.joined.append((row.request_id, position))
            row.last_step = plan.step


def _admissions(plan: StepPlan) -> list[Admission]:
    cached = dict(zip(plan.rows, plan.starts, strict=True))
    return [_admission(new_row, cached[new_row.row]) for new_row in plan.new_rows]


def _admission(new_row: NewRow, num_cached: int) -> Admission:
    num_prompt = new_row.num_prompt_tokens
    return Admission(new_row.request_id, num_prompt, min(num_cached, num_prompt))
