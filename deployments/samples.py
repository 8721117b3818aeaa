"""What is measured, under which names: `/metrics` and Ray tell the same samples.

Suffixes and labels are vLLM's where it measures the same
(https://docs.vllm.ai/en/latest/design/metrics).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from engine.outputs import EngineLoad

Labels = Mapping[str, str]

SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
"""Bounds for times of whole requests."""
TOKEN_SECONDS = (
    *(0.001, 0.002, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05),
    *(0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0),
)
"""Bounds for times between tokens: a step takes 5 to 50 ms on most GPUs."""
TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
"""Bounds for tokens of a request."""


class Family(NamedTuple):
    """Samples of one name."""

    kind: str
    """Prometheus' type: `gauge`, `counter` or `histogram`."""
    says: str


ENGINE_FAMILIES = {
    "num_requests_running": Family("gauge", "Requests in the running batch."),
    "num_requests_waiting": Family("gauge", "Requests that wait for admission."),
    "kv_cache_usage_perc": Family("gauge", "Share of KV blocks in use, from 0 to 1."),
    "kv_cache_free_blocks": Family("gauge", "KV blocks that a new request could take."),
    "num_preemptions_total": Family("counter", "Requests pushed out and recomputed."),
    "prefix_cache_queries_total": Family("counter", "Prompt tokens looked up."),
    "prefix_cache_hits_total": Family("counter", "Prompt tokens found in the prefix cache."),
    "prompt_tokens_total": Family("counter", "Prompt tokens computed, or found in the cache."),
    "generation_tokens_total": Family("counter", "Tokens generated."),
    "num_steps_total": Family("counter", "Steps done."),
    "device_idle_seconds_total": Family("counter", "Time in which no step was on the device."),
    "step_progress_age_seconds": Family(
        "gauge", "Time since a step ended, or an idle engine looked around."
    ),
}
"""Told by engines, one by one."""
INGRESS_FAMILIES = {
    "num_engines": Family("gauge", "Engines of the model that would be given a request now."),
    "num_requests_held": Family("gauge", "Requests that wait for an engine with room."),
    "scales_to_zero": Family("gauge", "1 if the model rests without an engine, else 0."),
    "num_failovers_total": Family("counter", "Requests sent on, as their engine was lost."),
    "request_success_total": Family("counter", "Completions that have ended."),
    "request_prompt_tokens": Family("histogram", "Prompt tokens, by prompt."),
    "request_generation_tokens": Family("histogram", "Tokens generated, by completion."),
    "time_to_first_token_seconds": Family("histogram", "Time to the first token."),
    "inter_token_latency_seconds": Family("histogram", "Time between tokens."),
    "request_time_per_output_token_seconds": Family("histogram", "Its mean, by request."),
    "e2e_request_latency_seconds": Family("histogram", "Time to the last token."),
    "request_queue_time_seconds": Family("histogram", "Time before the prefill."),
    "request_prefill_time_seconds": Family("histogram", "Time from there to the first token."),
    "request_decode_time_seconds": Family("histogram", "Time from there to the last token."),
    "response_cache_queries_total": Family("counter", "Prompts looked up in the response cache."),
    "response_cache_hits_total": Family("counter", "Prompts answered from the response cache."),
    "response_cache_bytes": Family("gauge", "Memory that the response cache takes."),
    "http_requests_total": Family("counter", "Requests answered, by status and reason."),
    "event_loop_lag_seconds": Family("gauge", "Longest lag of an event loop in ten seconds."),
}
"""Told by ingress replicas."""
FAMILIES = ENGINE_FAMILIES | INGRESS_FAMILIES


class Sample(NamedTuple):
    """A value at one moment; counters and histograms count from the start of the process."""

    family: str
    value: float
    labels: Labels
    suffix: str = ""
    """Of the name, where a family has several."""


class Histogram:
    """Counts values by size, as Prometheus has it.

    Args:
        bounds: upper ones of the buckets, ascending; a last bucket has none.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """By bucket, each for itself."""
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def samples(self, family: str, labels: Labels) -> Iterator[Sample]:
        """Its buckets, each with those below, its sum and its count."""
        counts = list(accumulate(self.counts))
        for bound, count in zip([*self.bounds, "+Inf"], counts, strict=True):
            yield Sample(family, count, {**labels, "le": str(bound)}, "_bucket")
        yield Sample(family, self.total, labels, "_sum")
        yield Sample(family, counts[-1], labels, "_count")


def engine_samples(load: EngineLoad, labels: Labels) -> Iterator[Sample]:
    """What an engine's load says."""
    used = 1 - load.free_blocks / load.total_blocks if load.total_blocks else 0.0
    for family, value in (
        ("num_requests_running", load.num_running),
        ("num_requests_waiting", load.num_waiting),
        ("kv_cache_usage_perc", used),
        ("kv_cache_free_blocks", load.free_blocks),
        ("num_preemptions_total", load.num_preemptions),
        ("prefix_cache_queries_total", load.prefix_queries),
        ("prefix_cache_hits_total", load.prefix_hits),
        ("prompt_tokens_total", load.prefilled_tokens),
        ("generation_tokens_total", load.generated_tokens),
        ("num_steps_total", load.step),
        ("device_idle_seconds_total", load.idle_s),
    ):
        yield Sample(family, value, labels)
