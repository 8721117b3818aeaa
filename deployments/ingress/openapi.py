"""`/openapi.json`: what may be sent here, by the models that check it.

docs/api-reference.md is made from the same tables.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

from pydantic.json_schema import JsonSchemaMode, models_json_schema
from starlette.requests import Request
from starlette.responses import Response

from deployments.ingress.errors import json_response
from deployments.ingress.gate import OPEN_PATHS
from deployments.ingress.served import ServedModels
from deployments.protocols.body import Body
from deployments.protocols.embeddings import EmbeddingsBody
from deployments.protocols.openai import ChatBody, CompletionBody
from deployments.protocols.responses import ResponsesBody
from deployments.protocols.simple import BatchGenerateBody, GenerateBody
from deployments.protocols.tokenize import DetokenizeBody, TokenizeBody
from engine.sampling_params import SamplingParams

_JSON, _EVENTS, _TEXT = "application/json", "text/event-stream", "text/plain"
_ANSWER = ("id", "object", "created", "model", "choices", "usage")
_EMBEDDINGS = ("id", "object", "created", "model", "data", "usage")
_RESPONSE = ("id", "object", "created_at", "status", "model", "output", "usage")


@dataclass(frozen=True, slots=True)
class Operation:
    """What a method of a path does."""

    path: str
    summary: str
    body: type[Body] | None = None
    """Of a POST; None for a GET."""
    answer: tuple[str, ...] = ()
    """Fields that every JSON answer has."""
    kinds: tuple[str, ...] = (_JSON,)
    """Content types of the answer."""

    @property
    def method(self) -> str:
        """Of HTTP."""
        return "GET" if self.body is None else "POST"


_BOTH = (_JSON, _EVENTS)
OPERATIONS: tuple[Operation, ...] = (
    Operation("/v1/chat/completions", "Answer a chat.", ChatBody, _ANSWER, _BOTH),
    Operation("/v1/completions", "Go on with a text.", CompletionBody, _ANSWER, _BOTH),
    Operation("/v1/responses", "Answer an input.", ResponsesBody, _RESPONSE, _BOTH),
    Operation("/v1/embeddings", "Embed texts.", EmbeddingsBody, _EMBEDDINGS),
    Operation("/chat/completions", "Answer a chat.", ChatBody, _ANSWER, _BOTH),
    Operation("/completions", "Go on with a text.", CompletionBody, _ANSWER, _BOTH),
    Operation("/embeddings", "Embed texts.", EmbeddingsBody, _EMBEDDINGS),
    Operation(
        "/tokenize",
        "Tell the tokens of a prompt or a chat.",
        TokenizeBody,
        ("count", "max_model_len", "tokens", "token_strs"),
    ),
    Operation("/detokenize", "Tell the text of tokens.", DetokenizeBody, ("prompt",)),
    Operation(
        "/generate",
        "Go on with a text, or answer the end of a chat.",
        GenerateBody,
        ("prompt", "text", "finish_reason", "usage"),
        _BOTH,
    ),
    Operation("/generate_stream", "The same, as a stream.", GenerateBody, kinds=(_EVENTS,)),
    Operation(
        "/batch_generate",
        "Go on with many texts.",
        BatchGenerateBody,
        ("texts", "results", "usage"),
    ),
    Operation("/v1/models", "List the models.", answer=("object", "data")),
    Operation(
        "/v1/models/{model_id}", "Describe a model.", answer=("id", "object", "max_model_len")
    ),
    Operation(
        "/health",
        "Tell that this process lives, and of its engines.",
        answer=("status", "engines"),
    ),
    Operation("/ready", "Tell whether every model can be served.", answer=("status",)),
    Operation("/ping", "The same; POST does so too.", answer=("status",)),
    Operation("/version", "Tell which release this is.", answer=("version",)),
    Operation("/metrics", "Tell load and counts, for Prometheus.", kinds=(_TEXT,)),
)


@dataclass(frozen=True, slots=True)
class Failure:
    """An answer other than success."""

    status: int
    type: str
    code: str | None
    when: str


FAILURES: tuple[Failure, ...] = (
    Failure(400, "invalid_request_error", None, "The request is wrong; `param` names the field."),
    Failure(401, "invalid_request_error", "invalid_api_key", "No API key came, or a wrong one."),
    Failure(
        403,
        "invalid_request_error",
        "host_not_allowed",
        "An open server on the loopback was called by another name.",
    ),
    Failure(404, "invalid_request_error", "model_not_found", "No such model is served."),
    Failure(404, "invalid_request_error", "not_found", "There is no such path."),
    Failure(405, "invalid_request_error", "method_not_allowed", "The path takes another method."),
    Failure(408, "invalid_request_error", "body_too_slow", "The body took too long to come."),
    Failure(413, "invalid_request_error", "body_too_large", "The body is too long."),
    Failure(429, "rate_limit_error", "server_overloaded", "Too much is under way or waits here."),
    Failure(429, "rate_limit_error", "rate_limit_exceeded", "The API key has had its share."),
    Failure(431, "invalid_request_error", "headers_too_large", "The headers are too long."),
    Failure(500, "server_error", None, "The server failed; its log says why."),
    Failure(503, "service_unavailable", "engine_unavailable", "No engine can take the request."),
    Failure(
        503, "service_unavailable", "engine_lost", "The engine was lost, and no other could go on."
    ),
    Failure(503, "service_unavailable", "server_stopping", "The server is about to stop."),
    Failure(504, "server_error", None, "The code of a plug-in takes too long."),
)

_TEXT_OR_NULL = {"type": ["string", "null"]}
_ERROR = {
    "type": "object",
    "description": "OpenAI's error object.",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _TEXT_OR_NULL,
                "code": _TEXT_OR_NULL,
            },
        }
    },
}


async def handle_openapi(models: ServedModels, request: Request, data: bytes) -> Response:
    """The OpenAPI document."""
    return json_response(openapi_document(tuple(models.by_name)))


@cache
def openapi_document(served: tuple[str, ...]) -> dict[str, Any]:
    """The document, in the form of OpenAPI 3.1, of a server of the models with these names."""
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        paths[operation.path] = {operation.method.lower(): _operation(operation)}
    paths["/ping"]["post"] = paths["/ping"]["get"]
    return {
        "openapi": "3.1.0",
        "info": {"title": "Trunkline", "version": "1"},
        "paths": paths,
        "components": {
            "schemas": _schemas(served),
            "responses": _failures(),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def field_docs(kind: type) -> dict[str, str]:
    """The docstrings under the fields of a class, on one line each.

    (Pydantic finds those of its models itself.)
    """
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    return dict(_docs_below(node.body)) if isinstance(node, ast.ClassDef) else {}


def _docs_below(lines: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for line, below in pairwise(lines):
        match line, below:
            case (
                ast.AnnAssign(target=ast.Name(name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                yield name, " ".join(text.split())


def _schemas(served: tuple[str, ...]) -> dict[str, Any]:
    mode: JsonSchemaMode = "validation"
    bodies = dict.fromkeys(operation.body for operation in OPERATIONS if operation.body)
    kinds = [(body, mode) for body in bodies]
    _, found = models_json_schema(kinds, ref_template="#/components/schemas/{model}")
    sampling = field_docs(SamplingParams)
    for schema in found["$defs"].values():
        fields = schema["properties"]
        for name in fields.keys() & sampling.keys():
            fields[name].setdefault("description", sampling[name])
        if "model" in fields:
            may_lack = [] if "model" in schema.get("required", ()) else [None]
            told = fields["model"]["description"]
            fields["model"] = {"enum": [*served, *may_lack], "description": told}
    return {**found["$defs"], "Error": _ERROR}


def _failures() -> dict[str, Any]:
    """The failures by status; each is one of several."""
    error = {"schema": {"$ref": "#/components/schemas/Error"}}
    statuses = sorted({failure.status for failure in FAILURES})
    return {
        f"Status{status}": {
            "description": " Or: ".join(f.when for f in FAILURES if f.status == status),
            "content": {_JSON: error},
        }
        for status in statuses
    }


def _operation(operation: Operation) -> dict[str, Any]:
    described: dict[str, Any] = {
        "summary": operation.summary,
        "responses": _responses(operation),
    }
    if operation.path in OPEN_PATHS:
        described["security"] = [{}]
    if operation.body is not None:
        reference = {"$ref": f"#/components/schemas/{operation.body.__name__}"}
        content = {_JSON: {"schema": reference}}
        described["requestBody"] = {"required": True, "content": content}
    if "{" in operation.path:
        name = operation.path[operation.path.index("{") + 1 : -1]
        schema = {"type": "string"}
        described["parameters"] = [{"name": name, "in": "path", "required": True, "schema": schema}]
    return described


def _responses(operation: Operation) -> dict[str, Any]:
    answer = {"type": "object", "required": list(operation.answer)}
    contents: dict[str, Any] = {_JSON: {"schema": answer}, _EVENTS: {}, _TEXT: {}}
    good = {"description": "The answer.", "content": {k: contents[k] for k in operation.kinds}}
    failed = {str(failure.status): failure.status for failure in FAILURES}
    return {
        "200": good,
        **{
            text: {"$ref": f"#/components/responses/Status{status}"}
            for text, status in failed.items()
        },
    }
