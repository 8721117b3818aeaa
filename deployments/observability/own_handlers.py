"""Places for log lines that a file names in the form of Python's `logging.config`."""

from __future__ import annotations

import logging
from logging.config import DictConfigurator
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from engine.errors import ConfigError

_SECTIONS = {"handlers", "formatters"}


def read_handlers(path: str) -> dict[str, Any]:
    """The sections of a file of handlers.

    Raises:
        ConfigError: it cannot be read, or has something else in it.
    """
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or "it is neither YAML nor JSON"
        raise ConfigError(f"logging.handlers_file '{path}' cannot be read: {reason}.") from None
    if not _has_sections(values):
        raise ConfigError(
            f"logging.handlers_file '{path}' must have `handlers` by name, and beside them only "
            "`formatters`; loggers and levels are the server's."
        )
    return values


def _has_sections(values: Any) -> TypeGuard[dict[str, Any]]:
    if not isinstance(values, dict) or not values.keys() <= _SECTIONS:
        return False
    named = all(isinstance(each or {}, dict) for each in values.values())
    return named and bool(values.get("handlers"))


def build_handlers(path: str, default: logging.Formatter) -> list[logging.Handler]:
    """Make the handlers of a file.

    Args:
        path: of the file.
        default: formatter of the handlers that name none.

    Raises:
        ConfigError: one cannot be made.
    """
    values = read_handlers(path)
    maker = DictConfigurator(values)
    made: dict[str, Any] = maker.config
    handlers = []
    try:
        for name, formatter in (made.get("formatters") or {}).items():
            made["formatters"][name] = maker.configure_formatter(formatter)
        for name in values["handlers"]:
            handlers.append(maker.configure_handler(made["handlers"][name]))
    except Exception as error:  # whatever a class says of its arguments, and no secret of the file
        cause = error.__cause__ or error
        raise ConfigError(
            f"logging.handlers_file '{path}': '{name}' cannot be made ({type(cause).__name__})."
        ) from None
    for handler in handlers:
        if handler.formatter is None:
            handler.setFormatter(default)
    return handlers
