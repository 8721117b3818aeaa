"""The ranks that share an engine's model, as actors beside the engine's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import ray

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.startup import start_engine

if TYPE_CHECKING:
    from engine.core import EngineCore
    from engine.parallel.meeting import Meeting


def start_ranked_engine(config: EngineConfig) -> EngineCore:
    """Start an engine in this actor, and its other ranks in actors of its placement group.

    Raises:
        ConfigError: the model or an option cannot be used.
    """
    return start_engine(config, RankActors)


class EngineRank:
    """Ray actor of one rank; it ends with the engine's."""

    def run(self, folder: str, rank: int) -> None:
        """Follow the first rank, which meets the others in a folder of this node; never returns."""
        from engine.parallel.following import follow
        from engine.parallel.meeting import Meeting

        follow(Meeting(Path(folder)), rank)


class RankActors:
    """All ranks but the first, each with what the actor that starts them has.

    Args:
        meeting: where they find the first.
    """

    def __init__(self, meeting: Meeting) -> None:
        mine = ray.get_runtime_context().get_assigned_resources()
        options = {"num_cpus": mine.get("CPU", 0), "num_gpus": mine.get("GPU", 0)}
        rank_class = ray.remote(EngineRank).options(**options, enable_task_events=False)
        ranks = range(1, meeting.config.tensor_parallel_size)
        self._actors = [rank_class.remote() for _ in ranks]
        folder = str(meeting.folder)
        actors = zip(ranks, self._actors, strict=True)
        self._runs = [actor.run.remote(folder, rank) for rank, actor in actors]

    def check(self) -> None:
        """Raise ConfigError if one has ended."""
        for run in ray.wait(self._runs, timeout=0)[0]:
            try:
                ray.get(run)
            except ray.exceptions.RayError as error:
                reason = str(error).splitlines()[-1]
                raise ConfigError(f"a rank of the engine ended as it started: {reason}") from error

    def end(self) -> None:
        """End them."""
        for actor in self._actors:
            ray.kill(actor)
