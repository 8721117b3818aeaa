"""Weights of a directory in Hugging Face layout, in one file or in shards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from engine.errors import ConfigError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def read_safetensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor by name, mapped from the files rather than read ahead.

    Raises:
        ConfigError: there are no safetensors, a shard is missing, or a file is damaged.
    """
    for path in _files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - the file is no mapping
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"{path} is damaged or incomplete ({error}); fetch it again."
            ) from error


def _files(folder: Path) -> list[Path]:
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if not (folder / _INDEX).is_file():
        raise ConfigError(_no_weights(folder))
    try:
        shards = sorted(set(json.loads((folder / _INDEX).read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{folder / _INDEX} is not a valid index ({error}); fetch it again."
        ) from error
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"{folder} lacks {len(missing)} of the {len(shards)} weight files that its index "
            f"names, such as {missing[0]}; fetch them."
        )
    return [folder / name for name in shards]


def _no_weights(folder: Path) -> str:
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        return (
            f"{folder} holds its weights as pickles, which can run code when loaded and are never "
            "read; convert them to safetensors."
        )
    return (
        f"{folder} has no weights: neither {_SINGLE} nor {_INDEX}. Fetch them, or set load_format "
        "to 'dummy' for random ones."
    )
