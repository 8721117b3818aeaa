"""Reads `serve_config.yaml`: Serve's own settings, and the arguments of the application."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from deployments.config import AppArgs
from engine.errors import ConfigError

IMPORT_PATH = "deployments.app:build"
"""Tells the application among those of a file."""


@dataclass(slots=True, frozen=True)
class ServeConfig:
    """What a file says, checked but for whether models fit."""

    host: str
    port: int
    args: AppArgs


def read_values(path: Path) -> dict[str, Any]:
    """The values of a configuration file.

    Raises:
        ConfigError: it is not there, not valid YAML, or has no application of this project.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    app_entry(values, path)
    return dict(values)


def app_entry(values: Any, path: Path) -> dict[str, Any]:
    """The part of a configuration that is about the application.

    Raises:
        ConfigError: there is none.
    """
    try:
        return next(app for app in values["applications"] if app["import_path"] == IMPORT_PATH)
    except (AttributeError, KeyError, StopIteration, TypeError):
        raise _incomplete(path) from None


def parse_values(values: dict[str, Any], path: Path) -> ServeConfig:
    """Check the values of a configuration.

    Args:
        values: of the file, see `read_values`.
        path: of the file, for errors.

    Raises:
        ConfigError: something is missing or wrong.
    """
    try:
        host = str(values["http_options"]["host"])
        port = int(values["http_options"].get("port", 8000))
        arguments = dict(app_entry(values, path).get("args") or {})
    except (AttributeError, KeyError, TypeError, ValueError):
        raise _incomplete(path) from None
    return ServeConfig(host, port, parse_args(arguments, str(path)))


def parse_args(arguments: dict[str, Any], where: str) -> AppArgs:
    """Check the arguments of the application.

    Args:
        arguments: untyped.
        where: they come from, for errors.

    Raises:
        ConfigError: one is wrong.
    """
    try:
        return AppArgs(**arguments)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(error)}") from None
    except TypeError:
        raise ConfigError(f"{where}: the application's args must have texts for names.") from None


def _incomplete(path: Path) -> ConfigError:
    return ConfigError(
        f"{path} must have applications, one of them with the import_path "
        f"{IMPORT_PATH}, and http_options with a host (127.0.0.1 for this machine "
        "alone, 0.0.0.0 for whoever reaches it)."
    )


def _explain(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}"
        for e in error.errors()
    )
