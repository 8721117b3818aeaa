"""A minimal offline API: prompts in, texts out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from engine.config import BUNDLED_MODEL
from engine.llm import LLM
from engine.sampling_params import SamplingParams


@dataclass(frozen=True, eq=False, slots=True)
class PromptSequence:
    """A prompt as a key of `InferenceEngine.generate`'s mapping; equal prompts stay apart."""

    prompt: str


class InferenceEngine:
    """An `LLM` behind two calls.

    Args:
        model_path: see `EngineConfig.model`.
        options: further fields of `EngineConfig`.

    Raises:
        ConfigError: as for `LLM`.
    """

    def __init__(self, model_path: str = BUNDLED_MODEL, **options: Any) -> None:
        self.llm = LLM(model_path, **options)

    def generate(
        self, prompts: Sequence[str], max_tokens: int = 64, **sampling: Any
    ) -> dict[PromptSequence, str]:
        """Complete prompts in one batch.

        Args:
            prompts: at least one.
            max_tokens: most tokens of each output.
            sampling: further fields of `SamplingParams`.

        Returns:
            Sequence (with `.prompt`) → its text, in the prompts' order.

        Raises:
            InvalidRequest: as for `LLM.generate`.
        """
        params = SamplingParams(max_tokens=max_tokens, **sampling)
        outputs = self.llm.generate(list(prompts), params, use_tqdm=False)
        sequences = map(PromptSequence, prompts)
        return {seq: output.text for seq, output in zip(sequences, outputs, strict=True)}

    def stream_generate(
        self, prompt: str, max_tokens: int = 64, **sampling: Any
    ) -> Iterator[tuple[int, str]]:
        """Complete one prompt and yield each token with the text that it completes.

        The text is empty while a token holds part of a character or could begin a stop string.
        """
        params = SamplingParams(max_tokens=max_tokens, **sampling)
        for delta in self.llm.stream(prompt, params):
            for token in delta.token_ids[:-1]:
                yield token, ""
            for token in delta.token_ids[-1:]:
                yield token, delta.text
