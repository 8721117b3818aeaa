"""Ranks as processes that this one starts."""

from __future__ import annotations

import os
import subprocess

import torch

from engine.child_process import module_command, module_environment
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.parallel.meeting import Meeting

END_LIMIT_S = 10.0


class RankProcesses:
    """All ranks but the first, each with a GPU of its own if the engine runs on GPUs.

    Args:
        meeting: where they find the first.

    Raises:
        ConfigError: there are fewer GPUs than ranks.
    """

    def __init__(self, meeting: Meeting) -> None:
        config = meeting.config
        gpus = _gpus(config)
        folder, environment = str(meeting.folder), module_environment()
        self._processes = [
            subprocess.Popen(
                module_command("engine.parallel.following", folder, str(rank)),
                env=environment | ({"CUDA_VISIBLE_DEVICES": gpus[rank]} if gpus else {}),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # whoever interrupts this process means it alone
            )
            for rank in range(1, config.tensor_parallel_size)
        ]

    def check(self) -> None:
        """Raise ConfigError if one has ended."""
        for rank, process in enumerate(self._processes, 1):
            if process.poll() is not None:
                raise ConfigError(
                    f"rank {rank} of the engine ended with status {process.returncode} as it "
                    "started; its log says why."
                )

    def end(self) -> None:
        """End them."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait(END_LIMIT_S)


def _gpus(config: EngineConfig) -> list[str]:
    """By rank, as the CUDA runtime names them; none for ranks on the CPU."""
    if config.device == "cpu" or not torch.cuda.is_available():
        return []
    size, count = config.tensor_parallel_size, torch.cuda.device_count()
    if count < size:
        raise ConfigError(f"tensor_parallel_size is {size}, but torch sees only {count} GPUs.")
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(gpu) for gpu in range(count)]
