"""The ranks that share an engine's model, as actors beside the engine's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from deployments.observability.logs import ProcessLog, configure_logging, current_setting
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.startup import freeze_heap, start_engine

if TYPE_CHECKING:
    from engine.core import EngineCore
    from engine.parallel.meeting import Meeting


def start_ranked_engine(config: EngineConfig) -> EngineCore:
    """Start an engine in this actor, and its other ranks in actors of its placement group.

    Raises:
        ConfigError: the model or an option cannot be used.
    """
    core = start_engine(config, RankActors)
    freeze_heap()
    return core


class EngineRank:
    """Ray actor of one rank; it ends with the engine's.

    Args:
        rank: of the engine's.
        log: how the engine's own actor logs.
    """

    def __init__(self, rank: int, log: ProcessLog | None) -> None:
        self._rank = rank
        self._model_name = log.place.model if log else None
        if log is not None:
            instance = f"{log.place.instance}-{rank}"
            place = replace(log.place, component="rank", instance=instance)
            configure_logging(log._replace(place=place))

    def __repr__(self) -> str:
        """As Ray's dashboard shows it."""
        return f"EngineRank({self._model_name}, {self._rank})"

    def run(self, folder: str) -> None:
        """Follow the first rank, which meets the others in a folder of this node; never returns."""
        from engine.parallel.following import follow
        from engine.parallel.meeting import Meeting

        follow(Meeting(Path(folder)), self._rank)


class RankActors:
    """All ranks but the first, each with what the actor that starts them has.

    Args:
        meeting: where they find the first.
    """

    def __init__(self, meeting: Meeting) -> None:
        mine = ray.get_runtime_context().get_assigned_resources()
        options = {"num_cpus": mine.get("CPU", 0), "num_gpus": mine.get("GPU", 0)}
        rank_class = ray.remote(EngineRank)
        engine = ray.get_runtime_context().get_actor_name() or "trunkline-engine"
        log = current_setting()
        self._actors = [
            rank_class.options(
                name=f"{engine}-rank-{rank}", enable_task_events=False, **options
            ).remote(rank, log)
            for rank in range(1, meeting.config.tensor_parallel_size)
        ]
        folder = str(meeting.folder)
        self._runs = [actor.run.remote(folder) for actor in self._actors]

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
