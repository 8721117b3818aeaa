"""The OpenAPI document says what the server does; Schemathesis looks for where it does not."""

from __future__ import annotations

import ast
import asyncio
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from deployments.ingress.app import ROUTES
from deployments.ingress.gate import OPEN_PATHS
from deployments.ingress.openapi import FAILURES, openapi_document
from tests.deployments.test_hostile_bodies import QUIET, Target, check_answer

DOCUMENT = openapi_document(("m",))
OPERATIONS = {
    f"{operation.method} {operation.path}": operation
    for operation in (
        found.ok() for found in schemathesis.openapi.from_dict(DOCUMENT).get_all_operations()
    )
}
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


@pytest.fixture(scope="module")
def target():
    with asyncio.Runner() as runner:
        opened = Target(runner)
        yield opened
        opened.close()


def test_every_route_is_in_the_document(target):
    routes = {(method, path.replace(":path", "")) for method, path, _ in ROUTES}
    found = {(o.method.upper(), o.path) for o in OPERATIONS.values()}
    assert found == routes - {("GET", "/openapi.json")}
    assert target.request(method="GET", url="/openapi.json").json() == DOCUMENT
    opened = {path for path, item in DOCUMENT["paths"].items() if "security" in item.get("get", {})}
    assert opened == OPEN_PATHS


def test_every_field_is_described():
    bare = [
        f"{body}.{name}"
        for body, schema in DOCUMENT["components"]["schemas"].items()
        for name, field in schema["properties"].items()
        if body != "Error" and not field.get("description")
    ]
    assert bare == []


def test_every_failure_of_the_code_is_in_the_document():
    folder = Path(__file__).parents[2] / "deployments" / "ingress"
    trees = [ast.parse(file.read_text()) for file in folder.glob("*.py")]
    calls = [call for tree in trees for call in ast.walk(tree) if is_api_error(call)]
    made = {(status, kind, code) for status, kind, code in map(told_by, calls) if status}
    told = {(f.status, f.type, f.code) for f in FAILURES}
    assert made - told == set()
    elsewhere = {"engine_lost", "not_found", "method_not_allowed"}
    assert {code for _, _, code in told - made} == elsewhere


def is_api_error(node):
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "ApiError"


def told_by(call):
    """Status, type and code, where they are literals."""
    found = [getattr(value, "value", None) for value in (call.args[0], call.args[2])]
    codes = [word.value.value for word in call.keywords if word.arg == "code" and found[0]]
    return *found, *(codes or [None])


@pytest.mark.parametrize("name", OPERATIONS)
@settings(QUIET, max_examples=20)
@given(data=st.data())
def test_answers_are_as_described(target, name, data):
    mode = data.draw(st.sampled_from(GenerationMode))
    case = data.draw(OPERATIONS[name].as_strategy(generation_mode=mode))
    response = send(target, case)
    check_answer(response, str(response.request.url) + response.request.content.decode("latin-1"))
    case.validate_response(response, checks=CHECKS)
    target.still_serves()


def send(target: Target, case: Case) -> httpx.Response:
    """Send a case, which Schemathesis writes as `requests` has it, with httpx."""
    arguments = case.as_transport_kwargs(base_url="http://test")
    del arguments["cookies"]
    if "data" in arguments:
        arguments["content"] = arguments.pop("data")
    return target.request(**arguments)
