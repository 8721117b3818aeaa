"""How long an engine's steps take, and how to learn that from measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BATCHED_TOKENS = 16384
"""Most tokens of a step in the measurements of prefill."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """A step's time is linear in what it computes; all figures are in seconds."""

    fixed_s: float
    """Of any step: weights are read, kernels launched."""
    row_s: float = 0.0
    """Of each request that gets a token after its first."""
    prefill_token_s: float = 0.0
    """Of each prompt token that it computes."""
    context_token_s: float = 0.0
    """Of each token whose keys its requests read."""

    def step(self, rows: int, context: int, prefill: int = 0) -> float:
        """Seconds of a step.

        Args:
            rows: requests that decode.
            context: tokens of all its requests that are in the cache when it has ended.
            prefill: prompt tokens that it computes.
        """
        reading = self.row_s * rows + self.context_token_s * context
        return self.fixed_s + reading + self.prefill_token_s * prefill

    def decode(self, rows: int, context: int, steps: int) -> float:
        """Seconds of successive decode steps of the same requests, each of which adds a token to
        the context of each: an arithmetic series."""
        growth = self.context_token_s * rows * steps * (steps - 1) / 2
        return steps * self.step(rows, context) + growth

    def decoded(self, rows: int, context: int, elapsed: float) -> int:
        """How many of these steps have ended after so many seconds; the inverse of `decode`."""
        first, growth = self.step(rows, context), self.context_token_s * rows
        linear = first - growth / 2  # growth / 2 · n² + linear · n = elapsed
        root = math.sqrt(linear * linear + 2 * growth * elapsed)
        return int(2 * elapsed / (linear + root) + 1e-9)


def fit(sweep: Mapping[str, Any], offline: Mapping[str, Any], max_rows: int) -> StepTime:
    """Step times of an engine that was measured.

    Decode by least squares of the relative error over the batches and contexts of `sweep`; prefill
    from the workloads of `offline` that ask for one token.

    Args:
        sweep: a result of `benchmarks.sweep`.
        offline: a result of `benchmarks.offline` for the same model and device.
        max_rows: larger batches are left out; beyond some size a step is no longer linear.

    Raises:
        ValueError: the files lack such measurements.
    """
    records = [record for record in sweep["records"] if record["batch"] <= max_rows]
    if len(records) < 3:
        raise ValueError("the sweep needs three batches of at most max_rows; take another file")
    seconds = np.array([record["step_and_idle_s"] for record in records])
    sizes = np.array([[1.0, record["batch"], record["context_tokens"]] for record in records])
    solved = np.linalg.lstsq(sizes / seconds[:, None], np.ones(len(records)), rcond=None)[0]
    fixed, row, context = (float(max(value, 0.0)) for value in solved)
    decode = StepTime(fixed, row, 0.0, context)
    return StepTime(fixed, row, _prefill_token_s(offline["records"], decode), context)


def _prefill_token_s(records: Sequence[Mapping[str, Any]], decode: StepTime) -> float:
    """Seconds of a prompt token, by the mean of the workloads without decode."""
    found: list[float] = []
    for record in records:
        tokens = record["input_tokens"]
        if record["output_tokens"] == record["requests"]:
            seconds = float(tokens) / record["median"]["prefill_tok_s"]
            steps = math.ceil(tokens / BATCHED_TOKENS)
            found.append((seconds - steps * decode.fixed_s) / tokens)
    if not found:
        raise ValueError("no workload of the offline file asks for one token; take another file")
    return sum(found) / len(found)


def errors(step_time: StepTime, sweep: Mapping[str, Any], max_rows: int) -> list[float]:
    """Relative error of each step of a sweep, of at most so many rows."""
    return [
        step_time.step(record["batch"], record["context_tokens"]) / record["step_and_idle_s"] - 1
        for record in sweep["records"]
        if record["batch"] <= max_rows
    ]
