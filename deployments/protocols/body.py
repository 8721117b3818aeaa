"""From bytes to a checked request body, with errors that name the field."""

from __future__ import annotations

import json
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from engine.errors import InvalidRequest


class Body(BaseModel):
    """Base of request bodies.

    Types are checked strictly. Unknown fields are ignored, as vLLM does, so that clients with
    more features keep working; fields that would change the answer and are not supported are
    refused rather than ignored.
    """

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Field → values that ask for nothing and so are accepted."""


B = TypeVar("B", bound=Body)


def parse_body(kind: type[B], data: bytes) -> B:
    """Decode and check a request body.

    Raises:
        InvalidRequest: the body is not JSON, not an object, or a field is wrong.
    """
    values = _decode(data)
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
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise InvalidRequest(f"the request body is not valid JSON{where}.") from None
    if not isinstance(values, dict):
        raise InvalidRequest("the request body must be a JSON object.")
    return values


def _first_error(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False, include_context=False)[0]
    param = str(first["loc"][0]) if first["loc"] else None
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    return InvalidRequest(f"{param}: {message}." if param else f"{message}.", param)
