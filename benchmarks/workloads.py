"""Named offline workloads: how many requests, how long, how sampled.

Only the standard library is used, so that a peer's own interpreter can draw the same requests.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Literal

FIRST_TOKEN = 100
"""Prompts hold no token id below this: special tokens sit there in the vocabularies measured."""

Range = tuple[int, int]
"""Least and most tokens, both included."""

Batching = Literal["continuous", "static", "single"]
"""How requests share the engine: a new one joins whenever one ends; in batches that each wait for
their longest; or one at a time."""


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
    batching: Batching = "continuous"
    lengths_seed: int | str | None = None
    """Seed of the lengths; None takes the name."""

    def draw(self, vocab_size: int, seed: int) -> Requests:
        """Draw the requests: lengths are the same for every seed, tokens are not."""
        seeded = self.name if self.lengths_seed is None else self.lengths_seed
        lengths = random.Random(seeded)
        tokens = random.Random(seed)
        prompts, outputs = [], []
        for _ in range(self.requests):
            size = lengths.randint(*self.prompt_tokens)
            prompts.append([tokens.randrange(FIRST_TOKEN, vocab_size) for _ in range(size)])
            outputs.append(lengths.randint(*self.output_tokens))
        return Requests(prompts, outputs, self.temperature, seed, self.static_batch, self.batching)


@dataclass
class Requests:
    """What an engine gets: `outputs[i]` tokens are to follow `prompts[i]`, end tokens ignored."""

    prompts: list[list[int]]
    outputs: list[int]
    temperature: float
    seed: int
    static_batch: int | None = None
    batching: Batching = "continuous"

    def first_token_only(self) -> Requests:
        """The same prompts with one token of output each: what prefill costs."""
        return replace(self, outputs=[1] * len(self.prompts))

    def first(self, requests: int, output_tokens: int) -> Requests:
        """The first `requests` requests with at most `output_tokens` each: a warm-up."""
        outputs = [min(size, output_tokens) for size in self.outputs[:requests]]
        return replace(self, prompts=self.prompts[:requests], outputs=outputs)

    def batches(self, size: int) -> list[Requests]:
        """What the engine is given in turn: everything, batches of `size`, or single requests."""
        if self.batching == "continuous":
            return [self]
        return self.split(1 if self.batching == "single" else size)

    def split(self, size: int) -> list[Requests]:
        """These requests in order, at most `size` at a time."""
        parts = [slice(at, at + size) for at in range(0, len(self.prompts), size)]
        return [replace(self, prompts=self.prompts[p], outputs=self.outputs[p]) for p in parts]

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
    *(
        Workload(f"{n}x128..512-256", n, (128, 512), (256, 256), 0.7, static_batch=64)
        for n in (16, 64, 1000)
    ),
    # The seed gives the total that the figures of other engines were measured with: 144,976.
    Workload(
        "256x100..1024-100..1024",
        256,
        (100, 1024),
        (100, 1024),
        0.6,
        static_batch=64,
        lengths_seed=16119,
    ),
    Workload("128x1024-1", 128, (1024, 1024), (1, 1), static_batch=16),
]
_BATCHING: list[tuple[Batching, int]] = [("continuous", 48), ("static", 48), ("single", 8)]
_S1 = [
    Workload(
        f"{n}x128..512-32..256-{batching}",
        n,
        (128, 512),
        (32, 256),
        0.7,
        batching=batching,
        lengths_seed="s1",
    )
    for batching, n in _BATCHING
]
_S2 = [Workload("256x32..2048-16..128", 256, (32, 2048), (16, 128), 0.7)]

WORKLOADS: dict[str, Workload] = {w.name: w for w in [*_CPU, *_GPU, *_S1, *_S2]}
"""Every workload by its name: requests x prompt tokens - output tokens."""


@dataclass(frozen=True)
class Suite:
    """Workloads that are measured together, and how unless the command line says otherwise."""

    workloads: list[Workload]
    engines: tuple[str, ...] = ("trunkline",)
    """Labels, as `benchmarks.engines.EngineSpec.parse` reads them."""
    rounds: int = 1
    prefill: bool = False
    """Whether a second run of each workload times its prefill alone."""


SUITES: dict[str, Suite] = {
    "cpu": Suite(_CPU, rounds=3, prefill=True),
    "gpu": Suite(_GPU),
    "s1": Suite(_S1, tuple(f"trunkline:max_num_seqs={n}" for n in (4, 8, 16))),
    "s2": Suite(
        _S2,
        tuple(f"trunkline:scheduling_policy={p},max_num_seqs=32" for p in ("fcfs", "sjf")),
    ),
}
"""`cpu` and `gpu` compare engines; `s1` has and has not continuous batching at batches of 4 to 16;
`s2` has a queue of mixed lengths, longer than a batch, under two scheduling policies."""
