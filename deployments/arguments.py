"""Arguments of the application in the forms that they may have, brought to one."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

from engine.config import BUNDLED_MODEL

ENGINE_OPTIONS = {"model_path": "model", "max_model_len": "max_model_len"}
"""Options that may stand at a model itself → their names in its `engine`."""
SINGLE_OPTIONS = {"model": "model", **ENGINE_OPTIONS}
"""The same of an only model that the arguments themselves tell of."""


def with_models(arguments: Mapping[str, Any], model_options: Collection[str]) -> dict[str, Any]:
    """Arguments with the table `models`, whether they had one or told of a single model.

    Args:
        arguments: nested or with dotted keys.
        model_options: names of the options of a model.

    Raises:
        ValueError: an option is given twice.
    """
    values = _nest(arguments)
    if "models" in values:
        return values
    options = (*model_options, *SINGLE_OPTIONS)
    single = {key: values.pop(key) for key in options if key in values}
    if not isinstance(single.get("engine") or {}, dict):
        return {**values, "models": {BUNDLED_MODEL: single}}
    single = into_engine(single, SINGLE_OPTIONS)
    engine = {"model": BUNDLED_MODEL, **(single.get("engine") or {})}
    served = os.path.basename(os.path.normpath(str(engine["model"])))
    return {**values, "models": {served: {**single, "engine": engine}}}


def without_models(arguments: Mapping[str, Any], model_options: Collection[str]) -> dict[str, Any]:
    """Arguments but for those that are about models.

    Args:
        arguments: nested or with dotted keys.
        model_options: names of the options of a model.
    """
    of_models = {"models", *model_options, *SINGLE_OPTIONS}
    return {k: v for k, v in arguments.items() if str(k).partition(".")[0] not in of_models}


def into_engine(
    model: Mapping[str, Any], names: Mapping[str, str] = ENGINE_OPTIONS
) -> dict[str, Any]:
    """Options of a model, with those that are the engine's own in `engine`.

    Args:
        model: options.
        names: option → name in `engine`.

    Raises:
        ValueError: an option is given twice.
    """
    engine = model.get("engine") or {}
    others = {key: value for key, value in model.items() if key not in names}
    if len(others) == len(model) or not isinstance(engine, dict):
        return others  # of which what is no table is found to be wrong
    engine = dict(engine)
    for name in names.keys() & model.keys():
        if names[name] in engine:
            raise ValueError(f"{name} and engine.{names[name]} mean the same; give one of them.")
        engine[names[name]] = model[name]
    return {**others, "engine": engine}


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dotted keys into nested dictionaries."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *groups, last = str(key).split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = {**place.get(last, {}), **value} if isinstance(value, dict) else value
    return nested
