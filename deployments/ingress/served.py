"""The models that an ingress replica serves, and running prompts on them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from deployments.aside import run_aside
from deployments.backlog import BacklogLimits
from deployments.engine_client import EngineClient
from deployments.engine_state import SILENT_S
from deployments.ingress.claims import current_claims
from deployments.ingress.errors import model_not_found, overloaded, unavailable
from deployments.ingress.logprob_budget import LogprobBudget
from deployments.ingress.message_style import MessageStyle
from deployments.ingress.request_counts import AnswerCounts, RequestCounts
from deployments.ingress.request_record import current_record
from deployments.ingress.response_cache import ResponseCache
from deployments.load_table import EngineView
from deployments.watchdog import LoopLag
from engine.embedding import Pooling
from engine.errors import InvalidRequest
from engine.inputs import Prompt, spell_bad_words
from engine.job import Job
from engine.output_processor import TextDelta
from engine.outputs import TokenDelta
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer

LONG_TEXT = 6144
"""Texts of more characters are tokenized in a thread, so that other streams do not wait.

About 1,500 tokens, for which others wait some 2 ms. The way to a thread and back costs tenths of
that, and the tokenizer remembers words in each thread by itself."""

MAX_CHARACTERS_PER_TOKEN = 40
"""A text with more than this for each token of `max_model_len` is refused without tokenizing it.
Prose has 3 to 5, indented code up to about 10."""

T = TypeVar("T")


class Piece(msgspec.Struct):
    """New text of one completion; `choice` numbers completions over all prompts."""

    choice: int
    job: Job
    delta: TextDelta


@dataclass(slots=True)
class ServedModel:
    """A model under the name that clients use."""

    name: str
    tokenizer: Tokenizer | None
    max_model_len: int
    vocab_size: int
    client: EngineClient
    max_concurrent_requests: int
    retry_after_s: int
    backlog_limits: BacklogLimits = field(default_factory=BacklogLimits)
    may_scale_to_zero: bool = False
    style: MessageStyle = field(default_factory=MessageStyle)
    allow_request_chat_templates: bool = False
    hidden_size: int = 0
    """Numbers of an embedding."""
    pooling: Pooling = "last"
    logprobs: LogprobBudget = field(default_factory=LogprobBudget)
    counts: RequestCounts = field(default_factory=RequestCounts)
    cache: ResponseCache = field(default_factory=ResponseCache)
    created: int = 0
    num_preparing: int = 0
    """Completions admitted and not yet started."""

    @contextmanager
    def admission(self, num_prompts: int, params: SamplingParams, param: str) -> Iterator[None]:
        """Hold places for the completions of a request while it is prepared.

        A request that is started counts by itself. So it must be started right after the `with`,
        before anything else can run in the event loop.

        Args:
            num_prompts: of the request.
            params: of each prompt.
            param: field that holds the prompts.

        Raises:
            InvalidRequest: the request alone is more than this process takes.
            ApiError: 429 when this process is full, the API key has too many, or too much waits
                already, 503 when there is no engine.
        """
        num_requests = num_prompts * params.n
        asking = param if num_prompts > 1 else "n"
        if num_requests > self.max_concurrent_requests:
            raise InvalidRequest(
                f"the request asks for {num_requests} completions, but this server takes at most "
                f"{self.max_concurrent_requests} at a time; ask for fewer.",
                asking,
            )
        current_record().admit(self.name)
        claims = current_claims()
        claims.enter_context(claims.key.hold(num_requests, asking))
        busy = self.client.num_running + self.num_preparing
        if busy + num_requests > self.max_concurrent_requests:
            raise overloaded(self.retry_after_s)
        if not self.ready and not self.may_scale_to_zero:
            raise unavailable(
                f"No engine of '{self.name}' is ready; it may still be loading.",
                self.retry_after_s,
            )
        self._check_backlog()
        self.num_preparing += num_requests
        try:
            yield
        finally:
            self.num_preparing -= num_requests

    def _check_backlog(self) -> None:
        if self.backlog_limits.are_set:
            backlog = self.client.table.backlog(self.client.deployment)
            if (later := self.backlog_limits.retry_after_s(backlog)) is not None:
                raise overloaded(max(later, self.retry_after_s), "backlog")

    def check_length(self, text: str, param: str) -> None:
        """Refuse a text that is too long before the work of tokenizing it.

        Raises:
            InvalidRequest: see above.
        """
        limit = MAX_CHARACTERS_PER_TOKEN * self.max_model_len
        if len(text) > limit:
            raise InvalidRequest(
                f"the prompt is too long: it has {len(text)} characters, and for max_model_len = "
                f"{self.max_model_len} tokens this server takes at most {limit}.",
                param,
            )

    @property
    def ready(self) -> bool:
        """Whether a trunk to an engine of this model is open."""
        return bool(self.client.hub.connected(self.client.deployment))

    @property
    def can_serve(self) -> bool:
        """Whether requests would be served now, or start an engine that does."""
        views = self.client.table.view(self.client.deployment)
        return self.may_scale_to_zero or any(map(self.is_served_by, views))

    def is_served_by(self, engine: EngineView) -> bool:
        """Whether the trunk to an engine is open, its load, which is due every second, comes, and
        no step of it is overdue."""
        connected = engine.engine_id in self.client.hub.connected(self.client.deployment)
        heard = engine.age_s is not None and engine.age_s <= SILENT_S
        return connected and heard and not engine.load.overdue

    def need_tokenizer(self, param: str) -> Tokenizer:
        """The tokenizer, for features that cannot do without.

        Raises:
            InvalidRequest: the model has none.
        """
        if self.tokenizer is None:
            raise InvalidRequest(
                f"'{self.name}' has no tokenizer, which {param} needs; send token ids to "
                "/v1/completions instead.",
                param,
            )
        return self.tokenizer

    async def run(self, jobs: Sequence[Job]) -> AsyncGenerator[list[Piece], None]:
        """Run jobs, but those whose answers the response cache has, and yield what is new of any
        completion until all have ended.

        Raises:
            InvalidRequest: an engine refused a request, or it wants too many log-probabilities.
            ApiError: an engine failed while it ran a request, or there is no memory for
                log-probabilities now.
            EngineDead: an engine was lost.
        """
        width = len(jobs[0].requests)
        choices = {
            request_id: (index * width + inner, job)
            for index, job in enumerate(jobs)
            for inner, request_id in enumerate(job.requests)
        }
        claims = current_claims()
        # An answer is kept until it has been written.
        memory = self.logprobs.hold(jobs, self.max_model_len, self.retry_after_s)
        claims.enter_context(memory)
        recall = self.cache.recall(jobs, claims.key.owner)
        claims.is_cache_hit = recall.is_hit
        requests = [request for job in recall.missing for request in job.requests.values()]
        record = current_record()
        journey = record.send(jobs)
        with (
            self.counts.follow(record) as gaps,
            self.client.start(requests, journey) as generation,
        ):
            async for deltas in recall.around(generation):
                pieces = []
                for delta in deltas:
                    choice, job = choices[delta.request_id]
                    if delta.finish_reason == "error":
                        raise self._failure(delta)
                    text = job.push(delta)
                    if gaps is not None and delta.token_ids:
                        gaps.note()
                    pieces.append(Piece(choice, job, text))
                    if text.finish_reason and job.processors[delta.request_id].must_abort:
                        generation.abort([delta.request_id])
                yield pieces

    def _failure(self, delta: TokenDelta) -> Exception:
        message = delta.error or "The engine failed."
        if delta.refused:
            return InvalidRequest(message, delta.param)
        return unavailable(message, self.retry_after_s, "engine_failed")

    async def finish(self, jobs: Sequence[Job]) -> None:
        """Run jobs to their end; the results are in the jobs."""
        async with aclosing(self.run(jobs)) as pieces:
            async for _ in pieces:
                pass


@dataclass(slots=True)
class ServedModels:
    """All models of an ingress replica."""

    by_name: dict[str, ServedModel] = field(default_factory=dict)
    lag: LoopLag | None = None
    """Of the event loop that serves them."""
    answers: AnswerCounts = field(default_factory=AnswerCounts)
    """Of all requests, those included that come to no model."""

    def find(self, name: str | None) -> ServedModel:
        """The model of this name; None will do when there is only one.

        Raises:
            ApiError: there is no such model.
        """
        if name is None and len(self.by_name) == 1:
            return next(iter(self.by_name.values()))
        if name is None:
            raise InvalidRequest(f"model must be one of {sorted(self.by_name)}.", "model")
        if name not in self.by_name:
            raise model_not_found(name, sorted(self.by_name))
        return self.by_name[name]


async def aside(text_length: int, work: Callable[[], T]) -> T:
    """Do work on a text: here when it is short, else in a thread."""
    return await run_aside(work) if is_long(text_length) else work()


def is_long(text_length: int) -> bool:
    """Whether work on a text is done in a thread."""
    return text_length > LONG_TEXT


async def build_jobs(
    model: ServedModel,
    request_id: str,
    prompts: Sequence[str | list[int]],
    params: SamplingParams,
    *,
    priority: int = 0,
    cache_salt: str | None = None,
    param: str = "prompt",
    add_special_tokens: bool = True,
    keep_last: int | None = None,
    pooling: Pooling | None = None,
) -> list[Job]:
    """Check and tokenize prompts; errors name `param`.

    Of each prompt its last `keep_last` tokens are kept. With `pooling`, see `Job.build`.

    Raises:
        InvalidRequest: a prompt or option cannot be served.
    """
    for prompt in prompts:
        if isinstance(prompt, str):
            model.check_length(prompt, param)

    def build() -> list[Job]:
        spelled = spell_bad_words(params, model.tokenizer)
        return [
            Job.build(
                f"{request_id}-{index}" if len(prompts) > 1 else request_id,
                _engine_prompt(model, prompt, add_special_tokens, keep_last),
                spelled,
                priority,
                model.tokenizer,
                model.max_model_len,
                model.vocab_size,
                pooling=pooling,
            )
            for index, prompt in enumerate(prompts)
        ]

    try:
        jobs = await aside(sum(map(len, [*prompts, *params.bad_words])), build)
    except InvalidRequest as error:
        renamed = param if error.param == "prompt" else error.param
        raise InvalidRequest(error.message, renamed) from None
    for job in jobs:
        for request in job.requests.values():
            request.cache_salt = cache_salt
    return jobs


def _engine_prompt(
    model: ServedModel,
    prompt: str | list[int],
    add_special_tokens: bool,
    keep_last: int | None,
) -> Prompt:
    if not isinstance(prompt, str):
        return {"prompt_token_ids": prompt if keep_last is None else prompt[-keep_last:]}
    if add_special_tokens and keep_last is None:
        return prompt
    tokenizer = model.need_tokenizer("add_special_tokens")
    ids = tokenizer.encode(prompt, add_special_tokens)
    if keep_last is not None and keep_last < len(ids):
        return {"prompt_token_ids": ids[-keep_last:]}
    return {"prompt": prompt, "prompt_token_ids": ids}
