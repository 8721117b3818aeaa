"""Loads plug-ins, and nothing that is not on the allow-list."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from deployments.plugins.serving_engine import ServingEngine
from deployments.protocols.body import Body
from engine.errors import ConfigError

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)

PluginClass = type[ServingEngine[Any]]


def by_class_name(allowed: Sequence[str]) -> dict[str, str]:
    """The entries of an allow-list by the names of their classes.

    Args:
        allowed: import paths, such as `package.module:Class`.

    Raises:
        ValueError: an entry is none, or two classes have the same name.
    """
    found: dict[str, str] = {}
    for path in allowed:
        if not _IMPORT_PATH.fullmatch(path):
            raise ValueError(f"'{path}' is no class; write it as package.module:Class.")
        name = path.partition(":")[2]
        if found.setdefault(name, path) != path:
            raise ValueError(f"{found[name]} and {path} have the same class name; rename one.")
    return found


def load_classes(
    class_names: Mapping[str, str | None], allowed: Sequence[str]
) -> dict[str, PluginClass]:
    """Import the classes that models name.

    Args:
        class_names: served name of each model → its `class_name`; those without are left out.
        allowed: the allow-list. It is asked before anything is imported.

    Raises:
        ConfigError: a class is not on the allow-list, not there, or no plug-in.
    """
    paths = by_class_name(allowed)
    named = {model: name for model, name in class_names.items() if name is not None}
    for model, name in named.items():
        if name not in paths:
            raise ConfigError(
                f"the model '{model}' has the class_name '{name}', which is not on the allow-list; "
                f"add package.module:{name} to ingress.allowed_classes if it may run here."
            )
    return {model: _load(paths[name]) for model, name in named.items()}


def _load(path: str) -> PluginClass:
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except (Exception, SystemExit) as error:  # whatever the module runs into
        raise ConfigError(f"cannot import {path} ({type(error).__name__}: {error}).") from error
    if not (isinstance(found, type) and issubclass(found, ServingEngine)):
        raise ConfigError(f"{path} is no subclass of deployments.plugins.ServingEngine.")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise ConfigError(f"{path} must override {missing}.")
    if not str(getattr(found, "path", "")).startswith("/"):
        raise ConfigError(f"{path} must set path to one that begins with /.")
    body = getattr(found, "request_model", None)
    if not (isinstance(body, type) and issubclass(body, Body)):
        raise ConfigError(
            f"{path} must set request_model to a subclass of deployments.plugins.Body."
        )
    return found
