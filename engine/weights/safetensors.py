"""Weights of a directory in Hugging Face layout, in one file or in shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from engine.errors import ConfigError
from engine.model_source import weight_files


def read_safetensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor by name, mapped from the files rather than read ahead.

    Raises:
        ConfigError: there are no safetensors, a shard is missing, or a file is damaged.
    """
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - the file is no mapping
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"{path} is damaged or incomplete ({error}); fetch it again."
            ) from error
