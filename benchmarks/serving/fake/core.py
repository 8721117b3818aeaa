"""A fake engine: the real scheduler, block pool and prefix cache, and steps by the clock."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.serving.fake.runner import FakeRunner
from benchmarks.serving.journal import JournalWriter
from engine.config import EngineConfig
from engine.model_config import read_model_config
from engine.model_source import resolve_model

if TYPE_CHECKING:
    from engine.core import EngineCore
    from engine.runner.build import EngineInfo
    from engine.startup import Stopwatch

BLOCK_SIZE = 16
TOTAL_BLOCKS = 65536
"""Enough that requests only ever wait for a row."""
BATCHED_TOKENS = 16384
"""What an engine on a GPU computes in one step at most."""


@dataclass(frozen=True)
class StartFakeEngine:
    """Starts an `EngineCore` around a `FakeRunner`.

    Called with the engine's configuration, of which everything but the device and the weights is in
    force; where it leaves them open, blocks and token budget are those above.
    """

    step_s: float
    """Seconds of a step."""
    token_s: float = 0.0
    """Seconds that each token of a prefill adds to it."""
    journal: Path | None = None
    """Folder to write an account of the steps to."""

    def __call__(self, config: EngineConfig) -> EngineCore:
        """Start the engine; imports torch, as any engine does."""
        from engine.core import EngineCore

        return EngineCore(config, build=self._build)

    def _build(self, config: EngineConfig, _: Stopwatch) -> tuple[FakeRunner, EngineInfo]:
        from engine.runner.build import EngineInfo

        shape = read_model_config(resolve_model(config.model))
        journal = JournalWriter(self.journal) if self.journal else None
        blocks = config.num_kvcache_blocks
        return FakeRunner(config.max_num_seqs, self.step_s, self.token_s, journal), EngineInfo(
            model=config.model,
            device="cpu",
            dtype="none",
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            max_model_len=config.resolve_max_model_len(shape.max_position_embeddings),
            max_num_batched_tokens=config.max_num_batched_tokens or BATCHED_TOKENS,
            block_size=config.kvcache_block_size or BLOCK_SIZE,
            num_blocks=TOTAL_BLOCKS if blocks == -1 else blocks,
            eos_token_ids=(),
        )
