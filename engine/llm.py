"""The offline API in vLLM's manner."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engine.config import BUNDLED_MODEL, EngineConfig
from engine.embedding import (
    POOLED_PARAMS,
    Pooling,
    check_dimensions,
    check_pooling,
    to_embedding,
)
from engine.errors import ConfigError, EngineDead, InvalidRequest, StepFailed
from engine.inputs import Prompt
from engine.job import Job
from engine.model_source import resolve_model
from engine.output_processor import TextDelta
from engine.outputs import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    RequestOutput,
    TokenDelta,
)
from engine.profile import StepRecord
from engine.progress import Progress
from engine.sampling_params import SamplingParams
from engine.startup import start_engine
from engine.tokenizer import Tokenizer, has_tokenizer

Message = Mapping[str, Any]
"""A chat message: `role`, `content` and what else the chat template reads."""

Inbox = deque[tuple[Job, TextDelta] | StepFailed | InvalidRequest]
"""What is new of the requests of one call, how they were lost, or why one cannot be served."""


class LLM:
    """An engine in this process. Calls block; for one thread at a time.

    Args:
        model: see `EngineConfig.model`.
        options: further fields of `EngineConfig`.

    Raises:
        ConfigError: an option is unknown or does not fit, or the model cannot be loaded.
    """

    def __init__(self, model: str = BUNDLED_MODEL, **options: Any) -> None:
        self.config = EngineConfig.parse({"model": model, **options})
        source = resolve_model(model)
        self._tokenizer = Tokenizer.load(source) if has_tokenizer(source) else None
        self.core = start_engine(self.config)
        self._ids = itertools.count()
        self._rng = random.Random(self.config.seed)
        self._owners: dict[str, tuple[Job, Inbox]] = {}
        """Request id → its job, and where to put what is new of it."""
        self._dead: Exception | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            ConfigError: the model has none; token ids alone go in and come out.
        """
        if self._tokenizer is None:
            raise ConfigError(f"{self.config.model} has no tokenizer; give prompt_token_ids.")
        return self._tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, batched continuously.

        Args:
            prompts: a string, `{"prompt": …}`, `{"prompt_token_ids": […]}`, or a list of these.
            sampling_params: one for all, one a prompt, or None for the defaults.
            use_tqdm: show a progress bar with prefill and decode tok/s.
            priority: one a prompt, lower first; counts under `scheduling_policy="priority"`.

        Returns:
            One output a prompt, in the prompts' order.

        Raises:
            InvalidRequest: a prompt or an option cannot be served; nothing was run, but for a
                grammar that proves to be of no use.
            StepFailed: a step with one of the requests failed, and all of them have ended. Others
                go on, and so does the engine.
            EngineDead: the engine cannot go on, now or since an earlier call.
        """
        jobs = self._jobs(prompts, sampling_params or SamplingParams(), priority)
        self._finish(jobs, use_tqdm)
        return [job.output() for job in jobs]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several.

        Args:
            messages: a list of messages, or a list of such lists.
            sampling_params: as for `generate`.
            use_tqdm: as for `generate`.
            chat_template: Jinja source to use in place of the model's own.
            add_generation_prompt: end the prompt with the start of the assistant's turn.
            continue_final_message: go on with the last message; the option above must be false.
            tools: JSON schemas of functions, for templates that know of tools.
            chat_template_kwargs: what else the template reads, such as `enable_thinking`; an entry
                replaces the option of its name.

        Raises:
            InvalidRequest: as for `generate`, or the template does not accept the messages.
        """
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if single else messages
        options: dict[str, Any] = {
            "chat_template": chat_template,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": tools,
            **(chat_template_kwargs or {}),
        }
        prompts: list[Prompt] = [
            {"prompt_token_ids": self.tokenizer.encode_chat(each, **options)}
            for each in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: Pooling = "last",
        dimensions: int | None = None,
        normalize: bool = True,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """Embed prompts, of up to `max_model_len` tokens.

        Args:
            prompts: as for `generate`.
            pooling: which hidden states make up the embedding.
            dimensions: numbers to keep of an embedding, the first ones; None keeps all.
            normalize: scale embeddings to the Euclidean length 1.
            use_tqdm: as for `generate`.
            priority: as for `generate`.

        Returns:
            One output a prompt, in the prompts' order.

        Raises:
            InvalidRequest, StepFailed, EngineDead: as for `generate`.
        """
        check_pooling(pooling)
        check_dimensions(dimensions, self.core.info.hidden_size)
        jobs = self._jobs(prompts, POOLED_PARAMS, priority, pooling)
        self._finish(jobs, use_tqdm)
        return [_embedding_output(job, dimensions, normalize) for job in jobs]

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[TextDelta]:
        """Complete one prompt and yield its text as it comes; closing the iterator aborts it.

        Raises:
            InvalidRequest: the prompt or an option cannot be served.
            StepFailed, EngineDead: as for `generate`, while the text is read.
        """
        job = self._job(prompt, sampling_params or SamplingParams(), 0)
        return (text for _, text in self._run([job]))

    def start_profile(self) -> None:
        """Keep a record of every step from now on, which slows them a little."""
        self.core.start_profile()

    def stop_profile(self) -> list[StepRecord]:
        """What each step since `start_profile` cost; waits for the device."""
        return self.core.stop_profile()

    def _jobs(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams],
        priority: Sequence[int] | None,
        pooling: Pooling | None = None,
    ) -> list[Job]:
        listed = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        params = _one_each(sampling_params, len(listed), "sampling_params")
        ranks = _one_each(0 if priority is None else priority, len(listed), "priority")
        return [self._job(*each, pooling) for each in zip(listed, params, ranks, strict=True)]

    def _job(
        self, prompt: Prompt, params: SamplingParams, priority: int, pooling: Pooling | None = None
    ) -> Job:
        info = self.core.info
        if params.structured_outputs is not None:
            params.structured_outputs.check()
        return Job.build(
            str(next(self._ids)),
            prompt,
            params,
            priority,
            self._tokenizer,
            info.max_model_len,
            info.vocab_size,
            self._rng,
            pooling,
        )

    def _finish(self, jobs: Sequence[Job], use_tqdm: bool) -> None:
        """Run jobs to their end; the results are in the jobs."""
        with Progress(len(jobs), enabled=use_tqdm) as progress:
            for job, delta in self._run(jobs):
                progress.update(job, delta)

    def _run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, TextDelta]]:
        """Run jobs to their end; several such iterators may take turns."""
        inbox: Inbox = deque()
        request_ids = [request_id for job in jobs for request_id in job.requests]
        try:
            for job in jobs:
                for request_id, wire in job.requests.items():
                    self.core.add(wire)
                    self._owners[request_id] = (job, inbox)
            while inbox or any(request_id in self._owners for request_id in request_ids):
                if not inbox:
                    self._step()
                while inbox:
                    item = inbox.popleft()
                    if isinstance(item, Exception):
                        raise item
                    yield item
        finally:
            self.core.abort([i for i in request_ids if self._owners.pop(i, None)])

    def _step(self) -> None:
        """Do one step and sort what is new to whoever waits for it."""
        if self._dead is not None:
            raise EngineDead("a step failed earlier; build a new LLM.") from self._dead
        try:
            deltas = self.core.step()
        except StepFailed as failure:
            for delta in failure.deltas:
                self._owners.pop(delta.request_id)[1].append(failure)
            return
        except Exception as error:
            self._dead = error
            self.core.fail_all(str(error))
            raise EngineDead(
                "the engine cannot go on; build a new LLM, in a new process if the GPU failed."
            ) from error
        for delta in deltas:
            job, inbox = self._owners[delta.request_id]
            if delta.finish_reason == "error":
                inbox.append(_end_of(delta))
                del self._owners[delta.request_id]
                continue
            text = job.push(delta)
            if text.finish_reason is not None:
                del self._owners[delta.request_id]
                self.core.abort([delta.request_id])  # a stop string ended it: the engine goes on
            inbox.append((job, text))


def _end_of(delta: TokenDelta) -> StepFailed | InvalidRequest:
    """What to raise for a request that has ended with an error."""
    message = delta.error or ""
    return InvalidRequest(message, delta.param) if delta.refused else StepFailed(message, [delta])


def _embedding_output(job: Job, dimensions: int | None, normalize: bool) -> EmbeddingRequestOutput:
    vector = to_embedding(job.pooled, dimensions, normalize)
    return EmbeddingRequestOutput(
        request_id=job.request_id,
        prompt=job.prompt,
        prompt_token_ids=job.prompt_token_ids,
        outputs=EmbeddingOutput(vector.tolist()),
        num_cached_tokens=job.output().num_cached_tokens,
        metrics=job.metrics,
    )


def _one_each(values: Any, count: int, name: str) -> Sequence[Any]:
    if not isinstance(values, Sequence):
        return [values] * count
    if len(values) != count:
        raise InvalidRequest(f"{name} has {len(values)} entries for {count} prompts.", name)
    return values
