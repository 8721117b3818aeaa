"""docs/api-reference.md: endpoints, their fields, errors and options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, get_args

from pydantic import BaseModel

from deployments.config import AppArgs
from deployments.ingress.gate import OPEN_PATHS
from deployments.ingress.openapi import FAILURES, OPERATIONS, Operation
from deployments.protocols.body import Body
from deployments.protocols.openai import GenerationBody
from deployments.protocols.sampling import SamplingFields
from deployments.protocols.structured_outputs import FormFields
from deployments.protocols.template import TemplateFields
from docs.generate.fields import fields_table, own_fields
from docs.generate.markdown import code, link, table
from engine.sampling_params import SamplingParams

_INTRO = """\
# API reference

Made by `make docs` from the code that checks requests and settings; edit it there.
[compatibility.md](compatibility.md) tells what differs from OpenAI's API and vLLM's server, and
[serving.md](serving.md) how it all is meant to be used. `GET /openapi.json` tells programs the
same.

A body is a JSON object. A field that is null counts as left out. Unknown fields are ignored. Fields
that would change an answer and are not supported are refused, unless they are empty.
"""
_ERRORS = """\
## Errors

An error is OpenAI's object, `{"error": {"message", "type", "param", "code"}}`. 429 and 503 carry
`Retry-After`. After a stream has begun, an error is an event of the stream.
"""
_SHARED: dict[type[Body], tuple[str, str]] = {
    SamplingFields: ("Sampling", "On every endpoint that generates."),
    FormFields: ("Form of the output", "On every endpoint that generates; at most one of these."),
    TemplateFields: ("From chat to prompt", "Where messages become a prompt."),
    GenerationBody: ("Prompts and streams", "On completions and chats."),
}
"""Fields that several bodies have, and under which heading they stand."""
_LEAST: dict[str, Any] = {
    "model": "m",
    "prompt": "x",
    "prompts": ["x"],
    "messages": [],
    "input": "x",
    "tokens": [],
}
"""A value for each required field."""


def api_reference() -> str:
    """The page."""
    return "\n".join((_INTRO, *_endpoints(), *_shared(), *_errors(), *_options()))


def _endpoints() -> Iterator[str]:
    yield "## Endpoints\n\nThe last column says which ask for an API key, if the server has any.\n"
    yield table(("Endpoint", "What it does", "Key"), map(_endpoint, OPERATIONS))
    for body in _bodies():
        yield from _post(body, [operation for operation in OPERATIONS if operation.body is body])


def _bodies() -> list[type[Body]]:
    return list(dict.fromkeys(operation.body for operation in OPERATIONS if operation.body))


def _endpoint(operation: Operation) -> tuple[str, str, str]:
    asks = "no" if operation.path in OPEN_PATHS else "yes"
    answer = ", ".join(f"`{name}`" for name in operation.answer)
    told = f" Answer: {answer}." if answer and operation.body is None else ""
    return f"`{operation.method} {operation.path}`", operation.summary + told, asks


def _post(body: type[Body], operations: list[Operation]) -> Iterator[str]:
    yield f"### {', '.join(operation.path for operation in operations)}\n"
    for answer, alike in groupby(operations, lambda operation: operation.answer):
        paths = " and ".join(f"`{operation.path}`" for operation in alike)
        told = ", ".join(f"`{name}`" for name in answer)
        yield f"{paths}: the answer has {told}.\n" if answer else f"{paths}: a stream of events.\n"
    shared = [kind for kind in _SHARED if issubclass(body, kind)]
    yield fields_table(body, own_fields(body, *shared), _defaults(body))
    if shared:
        limit = _defaults(body).get("max_tokens")
        told = "" if limit is None else f"; the default of `max_tokens` is {limit}"
        yield f"And the fields of {', '.join(link(_SHARED[kind][0]) for kind in shared)}{told}.\n"
    if body.unsupported:
        refused = ", ".join(_refused(*item) for item in sorted(body.unsupported.items()))
        yield f"Refused: {refused}.\n"


def _refused(name: str, harmless: tuple[Any, ...]) -> str:
    taken = [value for value in harmless if value not in (False, [], {}, "")]
    return f"`{name}` (but {' and '.join(map(code, taken))})" if taken else f"`{name}`"


def _defaults(body: type[Body]) -> dict[str, Any]:
    """What the engine is asked by a body with the required fields alone."""
    to_params: Callable[[Body], SamplingParams] | None = getattr(body, "to_params", None)
    if to_params is None:
        return {}
    least = {name: _LEAST[name] for name, field in body.model_fields.items() if field.is_required()}
    params = to_params(body.model_validate(least))
    return {name: getattr(params, name) for name in SamplingParams.__struct_fields__}


def _shared() -> Iterator[str]:
    yield "## Shared fields\n"
    found = {body.__name__: _defaults(body) for body in _bodies()}
    defaults = {
        name: _common([told[name] for told in found.values() if name in told])
        for name in SamplingParams.__struct_fields__
    }
    for kind, (heading, told) in _SHARED.items():
        yield f"### {heading}\n\n{told}\n"
        others = [other for other in _SHARED if other is not kind and issubclass(kind, other)]
        yield fields_table(kind, own_fields(kind, *others), defaults)
    yield from map(_group, models_of(*_bodies()))


def _common(values: list[Any]) -> Any:
    """The default that all bodies share."""
    alike = all(value == values[0] for value in values)
    return values[0] if alike else "by endpoint"


def _errors() -> Iterator[str]:
    yield _ERRORS
    rows = [
        (str(f.status), f"`{f.type}`", f"`{f.code}`" if f.code else "–", f.when) for f in FAILURES
    ]
    yield table(("Status", "Type", "Code", "When"), rows)


def _options() -> Iterator[str]:
    yield "## Options\n\nOf `serve_config.yaml`, under `args` of the application; see serving.md.\n"
    models: list[type[BaseModel]] = [AppArgs, *models_of(AppArgs)]
    yield from map(_group, models)


def _group(model: type[BaseModel]) -> str:
    told = inspect.cleandoc(model.__doc__ or "")
    return f"### {model.__name__}\n\n{told}\n\n{fields_table(model, model.model_fields)}"


def models_of(*models: type[BaseModel]) -> list[type[BaseModel]]:
    """The models that fields of these hold, and theirs."""
    found: list[type[BaseModel]] = []
    for field in (field for model in models for field in model.model_fields.values()):
        for kind in _parts(field.annotation):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found += [kind, *models_of(kind)]
    return list(dict.fromkeys(found))


def _parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for inner in get_args(annotation):
        yield from _parts(inner)
