"""Reads `serve_config.yaml`: Serve's own settings, and the arguments of the application."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from deployments.arguments import with_models
from deployments.config import AppArgs, ModelOptions
from engine.errors import ConfigError

IMPORT_PATH = "deployments.app:build"
"""Tells the application among those of a file."""
PORT_VARIABLE, NAME_VARIABLE = "SERVICE_PORT", "MODEL_NAME"
"""Of the environment: the port, and the name of the only model, in place of the file's."""


_PREFIX = "Value error, "
"""What pydantic puts before the sentences of this project."""


@dataclass(slots=True, frozen=True)
class ServeConfig:
    """What a file says, checked but for whether models fit."""

    path: Path
    """Of the file, for errors."""
    host: str
    port: int
    args: AppArgs

    def check(self) -> AppArgs:
        """Find out now what would else fail in every replica, see `AppArgs.check`.

        Raises:
            ConfigError: something would; the sentence names the file.
        """
        try:
            return self.args.check()
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from None


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


def apply_environment(
    values: dict[str, Any], path: Path, environment: Mapping[str, str] = os.environ
) -> bool:
    """Put what the environment says in place of what a configuration does.

    Args:
        values: of the configuration, see `read_values`; they are changed.
        path: of its file, for errors.
        environment: its variables; empty ones count as unset.

    Returns:
        Whether anything was put.

    Raises:
        ConfigError: a variable is wrong, or does not fit the configuration.
    """
    port, name = environment.get(PORT_VARIABLE), environment.get(NAME_VARIABLE)
    if port:
        if not isinstance(values.get("http_options"), dict):
            raise _incomplete(path)
        values["http_options"]["port"] = checked_port(port, PORT_VARIABLE)
    if name:
        rename_model(values, path, name, NAME_VARIABLE)
    return bool(port or name)


def rename_model(values: dict[str, Any], path: Path, name: str, asked_by: str) -> None:
    """Serve the only model of a configuration under another name.

    Args:
        values: of the configuration, see `read_values`; they are changed.
        path: of its file, for errors.
        name: of the model.
        asked_by: who wants that, for errors.

    Raises:
        ConfigError: there are several models.
    """
    entry = app_entry(values, path)
    arguments = entry.get("args") or {}
    if not isinstance(arguments, dict):
        raise _incomplete(path)
    try:
        arguments = with_models(arguments, ModelOptions.model_fields)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    models = arguments["models"]
    if not isinstance(models, dict) or len(models) != 1:
        raise ConfigError(
            f"{asked_by} is the name of an only model, which {path} does not have; name them there."
        )
    (model,) = models.values()
    entry["args"] = {**arguments, "models": {name: model}}


def checked_port(port: object, source: str) -> int:
    """A port, as a number.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(port, (int, str)) and str(port).isdecimal() and 0 < int(port) < 2**16:
        return int(port)
    raise ConfigError(f"{source} must be a port, from 1 to 65535, and not {port!r}.")


@contextmanager
def written(values: dict[str, Any]) -> Iterator[Path]:
    """A file of these values, for as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="trunkline-") as folder:
        path = Path(folder) / "serve_config.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        yield path


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
        port = values["http_options"].get("port", 8000)
        arguments = dict(app_entry(values, path).get("args") or {})
    except (AttributeError, KeyError, TypeError, ValueError):
        raise _incomplete(path) from None
    port = checked_port(port, f"{path}: http_options.port")
    return ServeConfig(path, host, port, parse_args(arguments, str(path)))


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
        ": ".join(filter(None, (".".join(map(str, e["loc"])), e["msg"].removeprefix(_PREFIX))))
        for e in error.errors()
    )
