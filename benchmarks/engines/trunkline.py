"""This project's engine, through the interface that its users have."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from benchmarks.engines import Engine, RequestTimes
from benchmarks.models import find_shape, read_vocab_size
from benchmarks.workloads import Requests
from engine import LLM, SamplingParams, StepRecord


class Trunkline(Engine):
    """`LLM.generate` on all requests at once; the prefix cache is off, as nothing repeats.

    Static batches are of the size that `max_num_seqs` allows to run together.
    """

    def __init__(self, model: str, load_format: str, **options: Any) -> None:
        options = {"enable_prefix_caching": False, **options}
        self.vocab_size = read_vocab_size(model)
        shape = find_shape(model)
        self._llm: Any = LLM(model=str(shape or model), load_format=load_format, **options)

    def run(self, requests: Requests) -> list[list[int]]:
        """Generate; the engine batches continuously unless the requests ask for less."""
        results = [
            result
            for batch in requests.batches(self._llm.config.max_num_seqs)
            for result in self._generate(batch)
        ]
        self.request_times = _times(results) if requests.batching == "continuous" else None
        return [list(result.outputs[0].token_ids) for result in results]

    def describe(self) -> dict[str, Any]:
        """The engine's `EngineInfo` (device, KV cache, seconds of each stage of the start).

        Without the model, which may be a path that means nothing elsewhere.
        """
        info = dataclasses.asdict(self._llm.core.info)
        del info["model"]
        return info

    def profile(self, requests: Requests) -> Sequence[StepRecord]:
        """Run `requests` and return what each step took."""
        self._llm.start_profile()
        try:
            self.run(requests)
        finally:
            steps: Sequence[StepRecord] = self._llm.stop_profile()
        return steps

    def _generate(self, requests: Requests) -> list[Any]:
        params = [
            SamplingParams(
                temperature=requests.temperature, max_tokens=size, ignore_eos=True, seed=index
            )
            for index, size in enumerate(requests.outputs)
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt in requests.prompts]
        results: list[Any] = self._llm.generate(prompts, params, use_tqdm=False)
        return results


def _times(results: list[Any]) -> list[RequestTimes]:
    return [
        RequestTimes(m.first_token_time - m.arrival_time, m.finished_time - m.arrival_time)
        for m in (result.metrics for result in results)
    ]
