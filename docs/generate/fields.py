"""Tables of the fields of pydantic models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from deployments.ingress.openapi import field_docs
from docs.generate.markdown import code, limits, link, table, type_name
from engine.sampling_params import RANGES, SamplingParams

Defaults = Mapping[str, Any]
"""Values that fields which are left out stand for, where they are not the model's own."""


def fields_table(
    model: type[BaseModel], names: Iterable[str], defaults: Defaults | None = None
) -> str:
    """A table of some fields of a model.

    Args:
        model: that has the fields.
        names: of the fields.
        defaults: what stands for null; a text is taken as it is.
    """
    rows = [
        (
            f"`{name}`",
            type_name(model.model_fields[name].annotation),
            _default(name, model.model_fields[name], defaults or {}),
            _meaning(name, model.model_fields[name]),
        )
        for name in names
    ]
    return table(("Field", "Type", "Default", "Meaning"), rows)


def own_fields(model: type[BaseModel], *shared: type[BaseModel]) -> list[str]:
    """The fields of a model that it does not have, or not as they are, from one of `shared`."""
    elsewhere = {name for other in shared for name in other.model_fields}
    elsewhere -= vars(model).get("__annotations__", {}).keys()
    return [name for name in model.model_fields if name not in elsewhere]


def _default(name: str, field: FieldInfo, defaults: Defaults) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None and name in defaults:
        told = defaults[name]
        return told if isinstance(told, str) else _told(told)
    return _told(value)


def _told(value: Any) -> str:
    if isinstance(value, BaseModel):
        return f"see {link(type(value).__name__)}"
    if value in (None, (), []):
        return "–"
    return code(value)


def _meaning(name: str, field: FieldInfo) -> str:
    told = _in_json(field.description or sampling_docs().get(name, ""))
    if within := limits(field):
        return f"{told} {within.capitalize()}."
    if field.description is None and name in RANGES:
        return f"{told} Must be {RANGES[name].meaning}."
    return told


def _in_json(told: str) -> str:
    """A docstring on one line, for readers who write no Python."""
    return re.sub(r"\bNone\b", "null", " ".join(told.split()))


@cache
def sampling_docs() -> dict[str, str]:
    """What the engine says of its sampling options, which bodies pass on."""
    return field_docs(SamplingParams)
