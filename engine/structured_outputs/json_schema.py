"""Finds in a JSON schema what xgrammar would not keep, so that it is refused and not ignored."""

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
_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = ("items", "additionalProperties", "propertyNames", "unevaluatedProperties")
_LOOKED_AT = frozenset(
    (*_NOT_KEPT, *_ALTERNATIVES, *_SCHEMAS_BY_NAME, *_SCHEMA_LISTS, *_SCHEMAS, "pattern")
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


def _look(schema: dict[str, Any]) -> Iterator[Any]:
    """Check one schema; the schemas within it."""
    for name in _NOT_KEPT:
        if schema.get(name, False) is not False:
            raise ValueError(f"uses {name}, which is not supported; leave it out.")
    if len(schema.get("allOf", ())) > 1:
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
    patterns = [schema.get("pattern"), *_mapping(schema, "patternProperties")]
    if any(isinstance(each, str) and _ESCAPED_IN_JSON.search(each) for each in patterns):
        raise ValueError(
            "has a pattern with a quote, a backslash or a line break, which is not supported."
        )
    if "pattern" in schema and not schema.keys().isdisjoint(("minLength", "maxLength")):
        raise ValueError("has pattern beside minLength or maxLength; put the length into pattern.")
    for name in _SCHEMAS_BY_NAME:
        yield from _mapping(schema, name).values()
    for name in _SCHEMA_LISTS:
        if isinstance(listed := schema.get(name), list):
            yield from listed
    yield from (schema[name] for name in _SCHEMAS if name in schema)


def _mapping(schema: dict[str, Any], name: str) -> dict[str, Any]:
    value = schema.get(name)
    return value if isinstance(value, dict) else {}
