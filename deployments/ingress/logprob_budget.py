"""How many log-probabilities the requests under way may come to: a few may want gigabytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from deployments.ingress.errors import overloaded
from engine.errors import InvalidRequest
from engine.job import Job
from engine.sampling_params import SamplingParams


class LogprobBudget:
    """Counts what requests may come to until they are answered, alternatives included.

    Args:
        limit: of all together; each takes about half a kilobyte until its answer is written.
    """

    def __init__(self, limit: int = 2**22) -> None:
        self.limit = limit
        self.held = 0

    @contextmanager
    def hold(self, jobs: Sequence[Job], max_model_len: int, retry_after_s: int) -> Iterator[None]:
        """Hold room for what jobs come to.

        Raises:
            InvalidRequest: the jobs alone may come to more than the limit.
            ApiError: 429 when there is no room now.
        """
        count = sum(most_logprobs(job, max_model_len) for job in jobs)
        if count > self.limit:
            raise InvalidRequest(
                f"the request may come to {count} log-probabilities, but this server takes at most "
                f"{self.limit} at a time; ask for fewer, or set a lower max_tokens.",
                "logprobs",
            )
        if count and self.held + count > self.limit:
            raise overloaded(retry_after_s, "logprobs")
        self.held += count
        try:
            yield
        finally:
            self.held -= count


def most_logprobs(job: Job, max_model_len: int) -> int:
    """How many log-probabilities a job may come to; an answer has the prompt's with each of its
    completions."""
    output, limit = max_model_len - len(job.prompt_token_ids), _params(job).max_tokens
    if limit is not None:
        output = min(output, limit)
    return _count(job, output * len(job.requests))


def num_logprobs(job: Job) -> int:
    """How many log-probabilities an answer with what a job has come to holds."""
    return _count(job, sum(len(processor.token_ids) for processor in job.processors.values()))


def _count(job: Job, num_tokens: int) -> int:
    params = _params(job)
    prompts = len(job.prompt_token_ids) * len(job.requests)
    of_prompt = 0 if params.prompt_logprobs is None else prompts * (1 + params.prompt_logprobs)
    of_output = 0 if params.logprobs is None else num_tokens * (1 + params.logprobs)
    return of_prompt + of_output


def _params(job: Job) -> SamplingParams:
    return next(iter(job.requests.values())).params  # those of the others ask for no more
