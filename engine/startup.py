"""Builds an engine and times each part of the start. Imports torch only when asked."""

from __future__ import annotations

import gc
import logging
import os
import time
from functools import partial
from typing import TYPE_CHECKING

from engine.config import EngineConfig

if TYPE_CHECKING:
    from engine.core import EngineCore
    from engine.parallel.leading import LaunchRanks

SPIN_COUNT = "3000"
"""Turns (some tens of microseconds) that a thread of a CPU step spins before it sleeps."""

logger = logging.getLogger("trunkline.engine")


class Stopwatch:
    """Seconds spent in the named stages of a start, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Book the time since the last lap to `stage`."""
        now = time.perf_counter()
        self.seconds[stage] = now - self._last
        self._last = now

    def __str__(self) -> str:
        stages = ", ".join(f"{stage} {spent:.2f}" for stage, spent in self.seconds.items())
        return f"{sum(self.seconds.values()):.2f} s ({stages})"


def start_engine(config: EngineConfig, launch: LaunchRanks | None = None) -> EngineCore:
    """Import, load and warm up an engine, and log one line with the time of each stage.

    Args:
        config: of the engine.
        launch: starts the other ranks, if several share the model; None starts processes.

    Raises:
        ConfigError: the model or an option cannot be used.
    """
    # Threads that wait for each other must soon sleep, not spin on: where something else wants the
    # cores, and in a server something always does, torch's default (some milliseconds) makes a step
    # tens of times slower. The OpenMP library reads this when torch loads it.
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    stopwatch = Stopwatch()
    from engine.core import EngineCore
    from engine.parallel.leading import build_ranks

    stopwatch.lap("import")
    core = EngineCore(config, stopwatch, partial(build_ranks, launch=launch))
    info = core.info
    logger.info(
        "engine ready in %s: %s, %s on %s, KV cache of %d blocks of %d tokens, max_model_len %d",
        stopwatch,
        info.model,
        info.dtype,
        info.device,
        info.num_blocks,
        info.block_size,
        info.max_model_len,
    )
    return core


def freeze_heap() -> None:
    """Spare the garbage collector what a start has made, in a process that only runs an engine.

    Serve does so in its replicas. To go over the objects of torch and of the model would hold up
    a step for a tenth of a second.
    """
    gc.collect()
    gc.freeze()
