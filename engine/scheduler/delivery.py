"""Turns the result of a step into what each request gained."""

from __future__ import annotations

import time

from engine.outputs import TokenDelta, TokenLogprobs
from engine.request import Request, Status
from engine.scheduler.step_builder import ScheduledStep
from engine.scheduler.stopping import check_stop
from engine.step import StepResult


class Delivery:
    """Appends sampled tokens to their requests, stops them, and tells what is new."""

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos_token_ids = eos_token_ids
        self.generated_tokens = 0
        """Tokens delivered so far."""

    def deliver(
        self, step: ScheduledStep, result: StepResult
    ) -> tuple[list[TokenDelta], list[Request]]:
        """Take in a result; returns the deltas and the requests that end with this step.

        Requests that finished while the step was in flight get nothing any more.
        """
        deltas: list[TokenDelta] = []
        finished: list[Request] = []
        num_vectors = 0
        sampled = zip(step.sampled, result.token_ids, strict=True)
        for place, (request, token) in enumerate(sampled):
            if request.status is Status.FINISHED:
                continue
            request.num_in_flight -= 1
            if request.pooling is None:
                request.token_ids.append(token)
                reason, stop_reason = check_stop(request, token, self._eos_token_ids)
                delta = TokenDelta(request.request_id, [token], reason, stop_reason)
            else:
                reason = "stop"
                num_vectors += 1
                delta = TokenDelta(request.request_id, [], reason, pooled=result.pooled[place])
            if not request.start_told:
                _tell_start(delta, request)
            if reason is not None:
                finished.append(request)
            deltas.append(delta)
        self.generated_tokens += len(deltas) - num_vectors
        if result.logprobs or result.prompt_logprobs:
            _attach_logprobs(deltas, step, result)
        return deltas, finished


def _tell_start(delta: TokenDelta, request: Request) -> None:
    """Add what is told once, with the first token: how the request came to it."""
    request.start_told = True
    delta.num_cached_tokens = request.num_cached_tokens
    delta.queued_s = request.admitted_at - request.received_at
    delta.prefill_s = time.monotonic() - request.admitted_at


def _attach_logprobs(deltas: list[TokenDelta], step: ScheduledStep, result: StepResult) -> None:
    """Add log-probabilities to `deltas`; a chunk of a prompt may have nothing else to tell."""
    by_id = {delta.request_id: delta for delta in deltas}
    plan = step.plan
    for request, row, start in zip(step.requests, plan.rows, plan.starts, strict=True):
        if request.status is Status.FINISHED:
            continue
        delta = by_id.get(request.request_id)
        if delta is not None and row in result.logprobs:
            delta.logprobs = [result.logprobs[row]]
        fresh = _not_yet_told(request, start, result.prompt_logprobs.get(row, []))
        if fresh:
            if delta is None:
                delta = TokenDelta(request.request_id, [])
                deltas.append(delta)
            delta.prompt_logprobs = fresh


def _not_yet_told(
    request: Request, start: int, entries: list[TokenLogprobs]
) -> list[TokenLogprobs]:
    """Entries, which begin at prompt position `start` + 1, without those told before."""
    fresh = entries[max(0, request.num_prompt_logprobs - start) :]
    request.num_prompt_logprobs += len(fresh)
    return fresh
