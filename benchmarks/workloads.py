"""Named offline workloads: how many requests, how long, how sampled.

Only the standard library is used, so that a peer's own interpreter can draw the same requests.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

FIRST_TOKEN = 100
"""Prompts hold no token id below this: special tokens sit there in the vocabularies measured."""

Range = tuple[int, int]
"""Least and most tokens, both included."""


@dataclass(frozen=True)
class Workload:
    """A batch of requests that all arrive at once and run to their full length."""

    name: str
    requests: int
    prompt_tokens: Range
    output_tokens: Range
    temperature: float = 0.0
    static_batch: int | None = None
    """Requests that an engine without continuous batching takes at once; None takes all."""

    def draw(self, vocab_size: int, seed: int) -> Requests:
        """Draw the requests: lengths are the same for every seed, tokens are not."""
        lengths = random.Random(self.name)
        tokens = random.Random(seed)
        prompts, outputs = [], []
        for _ in range(self.requests):
            size = lengths.randint(*self.prompt_tokens)
            prompts.append([tokens.randrange(FIRST_TOKEN, vocab_size) for _ in range(size)])
            outputs.append(lengths.randint(*self.output_tokens))
        return Requests(prompts, outputs, self.temperature, seed, self.static_batch)


@dataclass
class Requests:
    """What an engine gets: `outputs[i]` tokens are to follow `prompts[i]`, end tokens ignored."""

    prompts: list[list[int]]
    outputs: list[int]
    temperature: float
    seed: int
    static_batch: int | None = None

    def first_token_only(self) -> Requests:
        """The same prompts with one token of output each: what prefill costs."""
        ones = [1] * len(self.prompts)
        return Requests(self.prompts, ones, self.temperature, self.seed, self.static_batch)

    @property
    def input_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))

    @property
    def output_tokens(self) -> int:
        """Tokens that were asked for."""
        return sum(self.outputs)


_CPU = [
    *(Workload(f"{n}x128-48", n, (128, 128), (48, 48)) for n in (1, 4, 16, 32)),
    Workload("32x16..512-8..256", 32, (16, 512), (8, 256), static_batch=16),
]
_GPU = [
    Workload("1x128-256", 1, (128, 128), (256, 256)),
    *(Workload(f"{n}x128..512-256", n, (128, 512), (256, 256), 0.7) for n in (16, 64, 1000)),
    Workload("256x100..1024-100..1024", 256, (100, 1024), (100, 1024), 0.6),
    Workload("128x1024-1", 128, (1024, 1024), (1, 1)),
]

WORKLOADS: dict[str, Workload] = {w.name: w for w in [*_CPU, *_GPU]}
"""Every workload by its name: requests x prompt tokens - output tokens."""

SUITES: dict[str, list[str]] = {
    "cpu": [w.name for w in _CPU],
    "gpu": [w.name for w in _GPU],
}
"""Workloads that are measured together."""
