"""Every row of the table of compatibility is tried, and no field of the other APIs lacks one."""

from __future__ import annotations

import asyncio
import json
from functools import cached_property
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.compatibility.endpoints import ENDPOINTS, Endpoint
from tests.compatibility.rows import Case, Row, Seen, Table, lasting, text
from tests.compatibility.server import Server
from tests.compatibility.tables import TABLES

CASES = [
    pytest.param(
        table,
        row,
        case,
        id=f"{table.path}-{row.field}-{number}",
        marks=[pytest.mark.slow] if case.slow else [],
    )
    for table in TABLES
    for row in table.rows
    for number, case in enumerate(row.cases)
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with asyncio.Runner() as runner:
        opened = Server(runner, tmp_path_factory.mktemp("model"))
        yield opened
        opened.close()


@pytest.mark.parametrize(("table", "row", "case"), CASES)
def test_what_a_row_says(server: Server, table: Table, row: Row, case: Case) -> None:
    bare = table.without(case, row)
    body = {**bare, row.field: case.value}
    response = server.request("POST", table.path, body)
    if case.refused_for is not None:
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, case.refused_for), error
        return
    assert response.status_code == 200, response.text
    seen = Seen(
        read(response),
        server.last_request,
        lambda: read(server.request("POST", table.path, body)),
        lambda: read(server.request("POST", table.path, bare)),
    )
    if case.works is None:
        assert told(seen.answer, row) == told(seen.without, row)
    else:
        assert case.works(seen), seen.answer


def told(answer: Any, row: Row) -> Any:
    """What lasts of an answer; of a stream its text, as its pieces come as they may."""
    return text(answer) if isinstance(answer, list) else lasting(answer, row.field)


def read(response: httpx.Response) -> Any:
    """An answer, or the events of a stream."""
    if response.headers["content-type"] == "application/json":
        return response.json()
    lines = [line[6:] for line in response.text.split("\n") if line[:6] == "data: "]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.path)
def test_every_field_has_one_row(table: Table) -> None:
    rows = [row.field for row in table.rows]
    assert sorted(rows) == sorted(set(rows))
    assert (table.openai | table.vllm) - set(rows) == set(), "write rows for these"
    assert set(rows) - table.openai - table.vllm == set(), "these are fields of nobody"


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.path)
def test_rows_that_hold_in_part_say_in_which(table: Table) -> None:
    assert [row.field for row in table.rows if len(verdicts(row)) > 1 and not row.note] == []


def verdicts(row: Row) -> set[str]:
    return {case.verdict for case in row.cases if not case.is_invalid}


BODIES = {table.path: table.base for table in TABLES}


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda e: f"{e.method} {e.path}")
def test_endpoints_are_there_or_not(server: Server, endpoint: Endpoint) -> None:
    response = server.request(
        endpoint.method, endpoint.path.format(id="m"), BODIES.get(endpoint.path)
    )
    assert response.status_code == (200 if endpoint.here else 404), response.text


def test_every_resource_of_openai_has_an_endpoint() -> None:
    found = {name for name, value in vars(OpenAI).items() if isinstance(value, cached_property)}
    told = {endpoint.resource for endpoint in ENDPOINTS} - {""}
    assert found - {"with_raw_response", "with_streaming_response"} == told
