"""`/openapi.json`: what may be sent here, by the models that check it."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic.json_schema import JsonSchemaMode, models_json_schema
from starlette.requests import Request
from starlette.responses import Response

from deployments.ingress.errors import json_response
from deployments.ingress.gate import OPEN_PATHS
from deployments.ingress.served import ServedModels
from deployments.protocols.body import Body
from deployments.protocols.openai import ChatBody, CompletionBody
from deployments.protocols.responses import ResponsesBody
from deployments.protocols.simple import BatchGenerateBody, GenerateBody
from deployments.protocols.tokenize import DetokenizeBody, TokenizeBody

_JSON, _EVENTS, _TEXT = "application/json", "text/event-stream", "text/plain"
_POSTS: dict[str, tuple[type[Body], str, tuple[str, ...]]] = {
    "/v1/chat/completions": (ChatBody, "Answer a chat.", (_JSON, _EVENTS)),
    "/v1/completions": (CompletionBody, "Go on with a text.", (_JSON, _EVENTS)),
    "/v1/responses": (ResponsesBody, "Answer an input.", (_JSON, _EVENTS)),
    "/chat/completions": (ChatBody, "Answer a chat.", (_JSON, _EVENTS)),
    "/completions": (CompletionBody, "Go on with a text.", (_JSON, _EVENTS)),
    "/tokenize": (TokenizeBody, "Tell the tokens of a prompt or a chat.", (_JSON,)),
    "/detokenize": (DetokenizeBody, "Tell the text of tokens.", (_JSON,)),
    "/generate": (GenerateBody, "Go on with a text.", (_JSON,)),
    "/generate_stream": (GenerateBody, "Go on with a text, as a stream.", (_EVENTS,)),
    "/batch_generate": (BatchGenerateBody, "Go on with many texts.", (_JSON,)),
}
_GETS = {
    "/v1/models": "List the models.",
    "/v1/models/{model_id}": "Describe a model.",
    "/health": "Tell that this process lives, and of its engines.",
    "/ready": "Tell whether every model can be served.",
    "/ping": "Tell whether every model can be served.",
    "/version": "Tell which release this is.",
    "/metrics": "Tell load and counts, for Prometheus.",
}
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
    mode: JsonSchemaMode = "validation"
    bodies = [(body, mode) for body in dict.fromkeys(post[0] for post in _POSTS.values())]
    _, found = models_json_schema(bodies, ref_template="#/components/schemas/{model}")
    schemas = {**found["$defs"], "Error": _ERROR}
    for schema in schemas.values():
        if "model" in schema["properties"]:
            may_lack = [] if "model" in schema.get("required", ()) else [None]
            schema["properties"]["model"] = {"enum": [*served, *may_lack]}
    paths: dict[str, Any] = {path: {"get": _get(path, says)} for path, says in _GETS.items()}
    paths |= {path: {"post": _post(*post)} for path, post in _POSTS.items()}
    paths["/ping"]["post"] = paths["/ping"]["get"]
    return {
        "openapi": "3.1.0",
        "info": {"title": "Trunkline", "version": "1"},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _get(path: str, summary: str) -> dict[str, Any]:
    answers = (_TEXT,) if path == "/metrics" else (_JSON,)
    operation: dict[str, Any] = {"summary": summary, "responses": _responses(answers)}
    if path in OPEN_PATHS:
        operation["security"] = [{}]
    if "{" in path:
        name = path[path.index("{") + 1 : -1]
        schema = {"type": "string"}
        operation["parameters"] = [{"name": name, "in": "path", "required": True, "schema": schema}]
    return operation


def _post(body: type[Body], summary: str, answers: tuple[str, ...]) -> dict[str, Any]:
    reference = {"$ref": f"#/components/schemas/{body.__name__}"}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {_JSON: {"schema": reference}}},
        "responses": _responses(answers),
    }


def _responses(answers: tuple[str, ...]) -> dict[str, Any]:
    contents: dict[str, Any] = {_JSON: {"schema": {"type": "object"}}, _EVENTS: {}, _TEXT: {}}
    error = {"schema": {"$ref": "#/components/schemas/Error"}}
    return {
        "200": {
            "description": "The answer.",
            "content": {kind: contents[kind] for kind in answers},
        },
        "default": {"description": "An error.", "content": {_JSON: error}},
    }
