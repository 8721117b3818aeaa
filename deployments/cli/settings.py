"""A configuration file, and what the command line changes of it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from deployments.arguments import ENGINE_OPTIONS, into_engine, without_models
from deployments.config import ModelOptions
from deployments.serve_config import (
    NAME_VARIABLE,
    PORT_VARIABLE,
    app_entry,
    apply_environment,
    parse_args,
    read_values,
    rename_model,
)
from engine.config import BUNDLED_MODEL
from engine.errors import ConfigError
from engine.model_source import resolve_model

DEFAULT_FILE = Path("serve_config.yaml")
FLAGS = {
    "host": "http_options.host",
    "port": "http_options.port",
    "limit_concurrency": "ingress.max_concurrent_requests",
    "max_model_len": "engine.max_model_len",
}
"""Options of the command line that are settings."""


def read_settings(options: argparse.Namespace) -> tuple[Path, dict[str, Any], bool]:
    """The configuration that the options of `serve` or `check` ask for.

    They go before the environment, and that before the file.

    Returns:
        The file that it comes from, its values, and whether they differ from the file's.

    Raises:
        ConfigError: the file is not there or not valid, or a setting cannot be applied.
    """
    path = options.config or DEFAULT_FILE
    is_default = options.config is None and not path.exists()
    values = _default_values() if is_default else read_values(path)
    if options.model is not None:
        entry = app_entry(values, path)
        kept = without_models(_group(entry, "args"), ModelOptions.model_fields)
        entry["args"] = {"model": _absolute(options.model), **kept}
    settings = _all_settings(options)
    name, environment = options.served_model_name, dict(os.environ)
    if FLAGS["port"] in settings:
        environment.pop(PORT_VARIABLE, None)  # it may be wrong: Kubernetes may put a URL there
    if name is not None:
        environment.pop(NAME_VARIABLE, None)
        rename_model(values, path, name, "--served-model-name")
    from_environment = apply_environment(values, path, environment)
    apply_settings(values, app_entry(values, path), settings)
    given = options.model is not None or name is not None or bool(settings)
    return path, values, is_default or from_environment or given


def _all_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Dotted keys and their values, of all the words that give one.

    Raises:
        ConfigError: two give the same.
    """
    settings = parse_settings(options.settings)
    for flag, key in FLAGS.items():
        if (given := getattr(options, flag, None)) is not None:
            if key in settings:
                raise ConfigError(f"--{flag.replace('_', '-')} is --set {key}; give one of them.")
            settings[key] = given
    return settings


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """Dotted keys and their values, of words such as `engine.max_num_seqs=8`.

    Raises:
        ConfigError: a word is not of this form.
    """
    found: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            found[key] = value
        if not equals or not key.strip("."):
            raise ConfigError(f"--set {setting} must have the form KEY=VALUE.")
    return found


def apply_settings(
    values: dict[str, Any], entry: dict[str, Any], settings: Mapping[str, Any]
) -> None:
    """Put settings where they belong in a configuration.

    Args:
        values: of the whole file.
        entry: the application's part of it.
        settings: `http_options.…`, `ingress.…`, `logging.…`, `tracing.…`, `models.NAME.…`, and for
            the only model also without its name: `engine.…`, `deployment.…`; with their values.

    Raises:
        ConfigError: a setting begins with none of these.
    """
    arguments = _group(entry, "args")
    models = arguments.get("models") or {}
    for key, value in settings.items():
        first, _, rest = key.partition(".")
        if first == "http_options" and rest:
            _put(values, key, value)
        elif first in ("ingress", "logging", "tracing") and rest:
            _put(arguments, key, value)
        elif first == "models":
            name = _served_name(rest, models)
            _put_in_model(_group(models, name), rest.removeprefix(f"{name}."), value)
        elif first in ModelOptions.model_fields or key in ENGINE_OPTIONS:
            _put_in_model(_only_model(models, arguments, key), key, value)
        else:
            raise ConfigError(
                f"--set {key}: begin with engine, deployment, ingress, logging, tracing, "
                "http_options or models.NAME."
            )


def _only_model(models: dict[str, Any], arguments: dict[str, Any], key: str) -> dict[str, Any]:
    if len(models) > 1:
        raise ConfigError(
            f"--set {key}: there are several models; write models.NAME.{key}, with a NAME of "
            f"{', '.join(models)}."
        )
    return _group(models, next(iter(models))) if models else arguments


def _served_name(rest: str, models: dict[str, Any]) -> str:
    """The model that a key is about; names may have dots of their own."""
    names = [name for name in models if rest.startswith(f"{name}.")]
    if not names:
        raise ConfigError(f"--set models.{rest}: models are {', '.join(models) or 'not named'}.")
    return max(names, key=len)


def _put_in_model(model: dict[str, Any], key: str, value: Any) -> None:
    """Put an option where it belongs, in place of what may stand for it elsewhere."""
    try:
        given = into_engine(model)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    model.clear()
    model.update(given)
    _put(model, f"engine.{ENGINE_OPTIONS[key]}" if key in ENGINE_OPTIONS else key, value)


def _put(place: dict[str, Any], key: str, value: Any) -> None:
    *groups, last = key.split(".")
    for group in groups:
        place = _group(place, group)
    place[last] = value


def _group(place: dict[str, Any], name: str) -> dict[str, Any]:
    """The table of this name, made if there is none."""
    if place.get(name) is None:
        place[name] = {}
    group = place[name]
    if not isinstance(group, dict):
        raise ConfigError(f"{name} must be a table of settings, got {group!r}.")
    return group


def _absolute(model: str) -> str:
    """A path that holds in whatever folder Ray's processes run.

    Raises:
        ConfigError: there is no such model.
    """
    try:
        path = resolve_model(model).path
    except ConfigError as error:
        raise ConfigError(f"--model: {error}") from None
    return model if model == BUNDLED_MODEL else str(path.absolute())


def _default_values() -> dict[str, Any]:
    """What is served where there is no file: the bundled model, to this machine alone."""
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "127.0.0.1", "port": 8000, "keep_alive_timeout_s": 90},
        "logging_config": {"enable_access_log": False},
        "applications": [
            {
                "name": "trunkline",
                "route_prefix": "/",
                "import_path": "deployments.app:build",
                "args": {"model": BUNDLED_MODEL},
            }
        ],
    }


def local_model(model: str | None, settings: Iterable[str]) -> tuple[str, ModelOptions]:
    """A model to run in this process, and the name that requests give it.

    Args:
        model: None takes the bundled one.
        settings: such as `engine.max_num_seqs=8`.

    Raises:
        ConfigError: a setting does not fit.
    """
    arguments = {"model": model or BUNDLED_MODEL, **parse_settings(settings)}
    ((name, options),) = parse_args(arguments, "--set").models.items()
    options.check()
    return name, options
