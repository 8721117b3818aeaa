"""What it costs an ingress to measure: by token, by request, and to gather all samples.

Needs no GPU, and no Ray: what a call to it costs is not in here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from benchmarks.probes.records import Record, spread_record
from deployments.ingress.request_counts import RequestCounts, TokenGaps
from deployments.ingress.request_record import RequestRecord
from engine.job import Job
from engine.outputs import TokenDelta
from engine.sampling_params import SamplingParams

_PROMPT, _TOKENS = 500, 128
"""Tokens of a request, in and out."""
_VOCABULARY = 1000


def measure(rounds: int = 200, calls: int = 1000) -> Iterator[Record]:
    """Measure each, in so many rounds of so many calls."""
    counts = RequestCounts()
    gaps, record = TokenGaps(counts.gap_s), _ended_request()

    def count() -> None:
        with counts.follow(record):
            pass

    for method, call in (
        ("token", gaps.note),
        ("request", count),
        ("samples of a model", lambda: list(counts.samples({"model_name": "m", "ingress": "i"}))),
    ):
        number = calls if method == "token" else calls // 100
        yield spread_record(method, {}, _seconds(call, rounds, number))


def _seconds(call: Callable[[], object], rounds: int, calls: int) -> list[float]:
    """Processor time of one call, the mean of each round."""
    seconds = []
    for _ in range(rounds):
        began = time.process_time()
        for _ in range(calls):
            call()
        seconds.append((time.process_time() - began) / calls)
    return seconds


def _ended_request() -> RequestRecord:
    params = SamplingParams(max_tokens=_TOKENS, seed=0, detokenize=False)
    prompt = {"prompt_token_ids": [1] * _PROMPT}
    job = Job.build("r", prompt, params, 0, None, 2 * _PROMPT, _VOCABULARY)
    for place in range(_TOKENS):
        last = place == _TOKENS - 1
        job.push(TokenDelta("r", [1], "length" if last else None, prefill_s=0.01))
    record = RequestRecord("r", "/v1/completions", read_at=job.metrics.arrival_time)
    record.send([job])
    return record
