"""Checked access to the keys of a model's configuration files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import ConfigError


class ConfigKeys:
    """Checked access to the keys of a configuration file."""

    def __init__(self, values: Mapping[str, Any], where: Path) -> None:
        self.values = values
        self.where = where

    def error(self, key: str, problem: str) -> ConfigError:
        """An error whose sentence starts with the file and the key."""
        return ConfigError(f"{self.where}: {key} {problem}.")

    def integer(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        """The integer under `key`; `default` when it is missing or null."""
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise self.error(key, "is missing")
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise self.error(key, f"must be an integer of at least {minimum}, got {value!r}")
        return value

    def number(self, key: str, default: float) -> float:
        """The positive number under `key`; `default` when it is missing or null."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self.error(key, f"must be a positive number, got {value!r}")
        return float(value)

    def flag(self, key: str) -> bool:
        """The boolean under `key`; false when it is missing or null."""
        value = self.values.get(key) or False
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, got {value!r}")
        return value

    def token_ids(self, key: str) -> list[int]:
        """The id or ids under `key`; none when it is missing or null."""
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise self.error(key, f"must be a token id or a list of them, got {value!r}")
        return ids


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        ConfigError: it cannot be read or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a JSON object.")
    return values
