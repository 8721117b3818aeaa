"""From bytes to a checked request body, with errors that name the field."""

from __future__ import annotations

import json
from functools import partial
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from deployments.aside import run_aside
from engine.errors import InvalidRequest


class Body(BaseModel):
    """Base of request bodies.

    Types are checked strictly. Unknown fields are ignored, as vLLM does, so that clients with
    more features keep working; fields that would change the answer and are not supported are
    refused rather than ignored.

    Lists of typed elements need `FailFast` and must not be alternatives of one another: pydantic
    would describe every wrong element of a long list, for every alternative.
    """

    model_config = ConfigDict(
        strict=True,
        extra="ignore",
        allow_inf_nan=False,
        frozen=True,
        use_attribute_docstrings=True,  # `/openapi.json` and docs/api-reference.md tell them
    )

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Field → values that ask for nothing and so are accepted. Bodies that extend this one refuse
    the same, and more."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Take over what is refused by the bodies that this one extends."""
        named = [vars(base).get("unsupported", {}) for base in reversed(cls.__mro__)]
        cls.unsupported = {name: values for each in named for name, values in each.items()}


B = TypeVar("B", bound=Body)

MAX_DEPTH = 32
"""How deep lists and objects may lie in one another. What walks through a body, such as a chat
template, does so recursively, and Python ends a recursion only at about a thousand."""
LONG_BODY = 256 * 1024
"""Bodies of more bytes are parsed in a thread, so that other requests do not wait for all of it."""


async def read_body(kind: type[B], data: bytes) -> B:
    """`parse_body`, in a thread when the body is long."""
    if len(data) > LONG_BODY:
        return await run_aside(partial(parse_body, kind, data))
    return parse_body(kind, data)


def parse_body(kind: type[B], data: bytes) -> B:
    """Decode and check a request body.

    Raises:
        InvalidRequest: the body is not JSON, not an object, or a field is wrong.
    """
    values = _decode(data)
    # Brackets in texts count here too, so that most bodies need no closer look.
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and _is_deep(values):
        raise InvalidRequest(
            f"the request body nests lists and objects more than {MAX_DEPTH} deep; flatten it."
        )
    if b"\\ud" in data.lower():  # how JSON spells surrogates, paired or not
        _refuse_surrogates(values)
    for name, harmless in kind.unsupported.items():
        value = values.get(name)
        if value is not None and value not in harmless:
            raise InvalidRequest(f"{name} is not supported by this server; leave it out.", name)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _first_error(error) from None


def _decode(data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data.decode("utf-8-sig"))  # bytes would let raw surrogates through
    except (ValueError, RecursionError) as error:
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise InvalidRequest(f"the request body is not valid JSON{where}.") from None
    if not isinstance(values, dict):
        raise InvalidRequest("the request body must be a JSON object.")
    return values


def _is_deep(value: Any) -> bool:
    """Whether anything lies more than `MAX_DEPTH` deep; goes down level by level."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if type(parent) is dict else parent)
            if type(child) is dict or type(child) is list
        ]
        if not level:
            return False
    return True


def _refuse_surrogates(values: dict[str, Any]) -> None:
    """Half of a surrogate pair is no character: neither engines nor answers can be told of it."""
    for name, value in values.items():
        if not _encodable(name):
            raise InvalidRequest("a field's name holds an unpaired surrogate; remove it.")
        if not _encodable(value):
            raise InvalidRequest(f"{name} holds an unpaired surrogate; remove it.", name)


def _encodable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _first_error(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = str(first["loc"][0]) if first["loc"] else None
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    return InvalidRequest(f"{param}: {message}." if param else f"{message}.", param)
