"""Finds in a JSON schema what xgrammar would not keep, so that it is refused and not ignored; and
lets schemas move."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

_NOT_KEPT = (
    "contains",
    "dependencies",
    "dependentRequired",
    "dependentSchemas",
    "if",
    "not",
    "uniqueItems",
    "$dynamicRef",
    "$recursiveRef",
)
_ALTERNATIVES = ("$ref", "anyOf", "oneOf", "allOf")
"""Where one of these stands, assertions beside it are not kept."""
_ASSERTIONS = {
    "type",
    "enum",
    "const",
    "format",
    "pattern",
    "minLength",
    "maxLength",
    "multipleOf",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "properties",
    "required",
    "additionalProperties",
    "patternProperties",
    "propertyNames",
    "minProperties",
    "maxProperties",
    "items",
    "prefixItems",
    "minItems",
    "maxItems",
}
_ESCAPED_IN_JSON = re.compile(r'"|\\\\|(?<!\[\^)\\[nrt]')
"""Literals of a regular expression that a JSON string must spell another way."""
_COUNTS = re.compile(r"\{([\d\s,]*)\}")
"""How often something repeats, in a regular expression or a grammar."""
MAX_COUNT = 2**31 - 1
"""xgrammar takes larger numbers of repetitions for others, far smaller ones."""
TOO_OFTEN = f"repeats something more than {MAX_COUNT} times, which is not supported."
_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = ("items", "additionalProperties", "propertyNames", "unevaluatedProperties")
_LOOKED_AT = frozenset(
    (
        *(*_NOT_KEPT, *_ALTERNATIVES, *_SCHEMAS_BY_NAME, *_SCHEMA_LISTS, *_SCHEMAS),
        *("pattern", "maxProperties"),
    )
)


def check_schema(text: str) -> None:
    """Check that a schema is JSON and asks for nothing that would not be kept.

    Whether it can be compiled at all is found out when it is.

    Raises:
        ValueError: what is wrong, to be read after «the JSON schema».
    """
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"is not valid JSON{where}.") from None
    if not isinstance(schema, (dict, bool)):
        raise ValueError("must be an object.")
    level = [schema]
    while level:  # level by level: a recursion would end at Python's limit
        level = [
            child
            for parent in level
            if isinstance(parent, dict) and not _LOOKED_AT.isdisjoint(parent)
            for child in _look(parent)
        ]


def rebase(schema: Any, pointer: str) -> Any:
    """A copy of a schema for another place in a document: what it refers to in itself is there.

    Args:
        schema: a whole document until now, not deeper than Python's recursion.
        pointer: JSON pointer of the new place, such as `#/$defs/a`.
    """
    if not isinstance(schema, dict) or _LOOKED_AT.isdisjoint(schema):
        return schema
    moved = dict(schema)
    reference = schema.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        moved["$ref"] = pointer + reference[1:]
    for name in _SCHEMAS_BY_NAME:
        if name in schema and (named := _mapping(schema, name)):
            moved[name] = {key: rebase(each, pointer) for key, each in named.items()}
    for name in _SCHEMA_LISTS:
        if isinstance(listed := schema.get(name), list):
            moved[name] = [rebase(each, pointer) for each in listed]
    return moved | {name: rebase(schema[name], pointer) for name in _SCHEMAS if name in schema}


def repeats_too_often(expression: str) -> bool:
    """Whether a regular expression or a grammar has a count above `MAX_COUNT`."""
    counts = (count for each in _COUNTS.findall(expression) for count in re.findall(r"\d+", each))
    digits = (count.lstrip("0") for count in counts)
    return any(len(each) > len(str(MAX_COUNT)) or int(each or 0) > MAX_COUNT for each in digits)


def _look(schema: dict[str, Any]) -> Iterator[Any]:
    """Check one schema; the schemas within it."""
    for name in _NOT_KEPT:
        if schema.get(name, False) is not False:
            raise ValueError(f"uses {name}, which is not supported; leave it out.")
    together = schema.get("allOf", [])
    if not isinstance(together, list):
        raise ValueError("has an allOf that is no list; give a list of one schema.")
    if len(together) > 1:
        raise ValueError("has several schemas in allOf, which is not supported; merge them.")
    reference = schema.get("$ref", "#")
    if not isinstance(reference, str) or not reference.startswith("#"):
        raise ValueError("refers to another document; put what it refers to into $defs.")
    for name in _ALTERNATIVES:
        beside = _ASSERTIONS & schema.keys() if name in schema else ()
        if beside:
            raise ValueError(
                f"has {', '.join(sorted(beside))} beside {name}, which is not supported; move "
                f"them into {name}."
            )
    _check_patterns(schema)
    most = schema.get("maxProperties")
    if isinstance(most, (int, float)) and most > MAX_COUNT:
        raise ValueError(f"allows more than {MAX_COUNT} properties; leave maxProperties out.")
    for name in _SCHEMAS_BY_NAME:
        yield from _mapping(schema, name).values()
    for name in _SCHEMA_LISTS:
        if isinstance(listed := schema.get(name), list):
            yield from listed
    yield from (schema[name] for name in _SCHEMAS if name in schema)


def _check_patterns(schema: dict[str, Any]) -> None:
    given = [schema.get("pattern"), *_mapping(schema, "patternProperties")]
    patterns = [each for each in given if isinstance(each, str)]
    if any(map(_ESCAPED_IN_JSON.search, patterns)):
        raise ValueError(
            "has a pattern with a quote, a backslash or a line break, which is not supported."
        )
    if any(map(repeats_too_often, patterns)):
        raise ValueError(f"has a pattern that {TOO_OFTEN}")
    if "pattern" in schema and not schema.keys().isdisjoint(("minLength", "maxLength")):
        raise ValueError("has pattern beside minLength or maxLength; put the length into pattern.")


def _mapping(schema: dict[str, Any], name: str) -> dict[str, Any]:
    value = schema.get(name)
    return value if isinstance(value, dict) else {}
