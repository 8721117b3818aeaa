"""vLLM's offline `LLM`, in an interpreter that has it.

Written against the public interface of vLLM 0.24 (`LLM`, `SamplingParams`, `TokensPrompt`). No
result file of this project was made with it yet: the machine of the GPU runs had no vLLM.
"""

from __future__ import annotations

from typing import Any

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

from benchmarks.engines import Engine
from benchmarks.models import read_vocab_size
from benchmarks.workloads import Requests

DEFAULT_BATCH = 256
"""Size of a static batch where `max_num_seqs` is not given."""


class VllmGenerate(Engine):
    """`LLM.generate` on all requests at once, on token ids alone, without the prefix cache.

    Requests are not seeded: vLLM draws the noise of seeded ones row by row, which would slow it.
    """

    def __init__(self, model: str, load_format: str, **options: Any) -> None:
        """Load `model`.

        Args:
            model: a directory in Hugging Face layout.
            load_format: `dummy` draws random weights for the shape in `config.json`.
            options: further arguments of vLLM's `LLM`.
        """
        options = {"enable_prefix_caching": False, **options}
        self.vocab_size = read_vocab_size(model)
        self._options = options
        self._llm = LLM(model=model, load_format=load_format, skip_tokenizer_init=True, **options)

    def run(self, requests: Requests) -> list[list[int]]:
        """Generate; vLLM batches continuously unless the requests ask for less."""
        batches = requests.batches(self._options.get("max_num_seqs", DEFAULT_BATCH))
        return [tokens for batch in batches for tokens in self._generate(batch)]

    def describe(self) -> dict[str, Any]:
        """The arguments that were given; vLLM's own defaults hold for the rest."""
        return dict(self._options)

    def _generate(self, requests: Requests) -> list[list[int]]:
        prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in requests.prompts]
        params = [
            SamplingParams(
                temperature=requests.temperature,
                max_tokens=size,
                ignore_eos=True,
                detokenize=False,
            )
            for size in requests.outputs
        ]
        results = self._llm.generate(prompts, params, use_tqdm=False)
        return [list(result.outputs[0].token_ids) for result in results]
