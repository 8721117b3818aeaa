"""Where the ranks of an engine, which run on one machine, find each other."""

from __future__ import annotations

import gc
import os
import shutil
import socket
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import distributed
from torch._C._distributed_c10d import FileStore

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.parallel.group import TensorGroup

COLLECTIVE_LIMIT_S = 600.0
"""How long a rank waits for another in an exchange: one may compile while the other does not. A
lost rank is noticed at once, by its link."""
_ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
}
"""Ranks of one machine need no network, whatever its names resolve to. Multicast over NVLink takes
memory and rights that containers often lack, and is of no use at these sizes. The GPUs of several
ranks may have the same number, each in its own process."""


@dataclass(frozen=True)
class Meeting:
    """A folder, closed to other users, in which the ranks leave what the others need to know."""

    folder: Path

    @classmethod
    def call(cls, folder: Path, config: EngineConfig) -> Meeting:
        """Prepare a folder that is empty."""
        meeting = cls(folder)
        meeting._config.write_text(config.model_dump_json())
        return meeting

    @property
    def config(self) -> EngineConfig:
        """Of the engine."""
        return EngineConfig.model_validate_json(self._config.read_text())

    def listen(self) -> socket.socket:
        """Where the first rank waits for the others."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self._socket))
        listener.listen()
        return listener

    def connect(self) -> Connection:
        """A link to the first rank."""
        link = socket.socket(socket.AF_UNIX)
        link.connect(str(self._socket))
        return Connection(link.detach())

    def join(self, rank: int, device: torch.device) -> TensorGroup:
        """Wait for all ranks, and form a group with them.

        Raises:
            ConfigError: this process is in a group already.
            RuntimeError: a rank was lost meanwhile.
        """
        if distributed.is_initialized():
            gc.collect()  # an engine that failed is part of a cycle, by its error
        if distributed.is_initialized():
            raise ConfigError(
                "this process has an engine with tensor_parallel_size above 1 already, or uses "
                "torch.distributed itself; start the engine in a process of its own."
            )
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        size = self.config.tensor_parallel_size
        distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=FileStore(str(self.folder / "store"), size),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=COLLECTIVE_LIMIT_S),
        )
        group = TensorGroup(rank, size, distributed.group.WORLD)
        group.most(rank, device)  # NCCL connects now: nothing interrupts it if a rank fails first
        return group

    def clear_up(self) -> None:
        """Remove the folder, if nobody else has."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _config(self) -> Path:
        return self.folder / "config.json"

    @property
    def _socket(self) -> Path:
        return self.folder / "ranks"
