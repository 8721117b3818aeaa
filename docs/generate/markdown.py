"""Markdown from Python values."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

_NAMES = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    dict: "object",
    list: "array",
}
_BOUNDS = ((Ge, "ge", "at least {}"), (Gt, "gt", "above {}"), (Le, "le", "at most {}"))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def anchor(heading: str) -> str:
    """The fragment by which GitHub links to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def link(heading: str) -> str:
    """A link to a heading of the same page."""
    return f"[{heading}](#{anchor(heading)})"


def code(value: Any) -> str:
    """A value as JSON."""
    return f"`{json.dumps(value)}`"


def type_name(annotation: Any) -> str:
    """A type in the words of JSON; null is left out.

    Models are links to a heading of their name.
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(inner[0])
    if origin in (Union, UnionType):
        kinds = (type_name(kind) for kind in inner if kind is not type(None))
        return ", ".join(dict.fromkeys(kinds))
    if origin is Literal:
        return ", ".join(map(code, inner))
    if origin in (list, dict) and inner[-1] is not Any:
        holds = "array" if origin is list else "object"
        return f"{holds} of {_plural(type_name(inner[-1]))}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return link(annotation.__name__)
    return _NAMES.get(origin or annotation, "any")


def _plural(name: str) -> str:
    if name.startswith("["):
        return name
    first, *rest = name.split(" ", 1)
    return " ".join((f"{first}s", *rest))


def limits(field: FieldInfo) -> str:
    """What a field's constraints say, such as `at least 1`; empty where there are none."""
    metadata = [*field.metadata, *_metadata(field.annotation)]
    found = [
        words.format(_number(getattr(bound, name)))
        for kind, name, words in (*_BOUNDS, (Lt, "lt", "below {}"))
        for bound in metadata
        if isinstance(bound, kind)
    ]
    return ", ".join(found)


def _metadata(annotation: Any) -> Iterator[Any]:
    """The constraints within a type."""
    for inner in get_args(annotation):
        if isinstance(inner, FieldInfo):
            yield from inner.metadata
        yield from _metadata(inner)


def _number(value: Any) -> str:
    """A number; large powers of two as such."""
    size = abs(value)
    if isinstance(value, int) and size >= 2**31 and size & (size - 1) == 0:
        return f"{'-' if value < 0 else ''}2^{size.bit_length() - 1}"
    return f"{value:g}" if isinstance(value, float) else str(value)
