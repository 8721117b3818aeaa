"""This project's engine, through the interface that its users have."""

from __future__ import annotations

from typing import Any

from benchmarks.models import read_vocab_size
from benchmarks.workloads import Requests
from engine import LLM, SamplingParams


class Trunkline:
    """`LLM.generate` on all requests at once; the prefix cache is off, as nothing repeats."""

    def __init__(self, model: str, load_format: str, **options: Any) -> None:
        options = {"enable_prefix_caching": False, **options}
        self.vocab_size = read_vocab_size(model)
        self._llm = LLM(model=model, load_format=load_format, **options)

    def run(self, requests: Requests) -> list[list[int]]:
        """Generate; the engine batches continuously."""
        params = [
            SamplingParams(
                temperature=requests.temperature, max_tokens=size, ignore_eos=True, seed=index
            )
            for index, size in enumerate(requests.outputs)
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt in requests.prompts]
        results = self._llm.generate(prompts, params, use_tqdm=False)
        return [list(result.outputs[0].token_ids) for result in results]
