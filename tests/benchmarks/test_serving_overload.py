"""Refusals and what becomes of the requests that were accepted."""

from __future__ import annotations

import json

import pytest

from benchmarks.serving.client import Exchange
from benchmarks.serving.load import Load, Sent
from benchmarks.serving.overload import judge, table
from tests.benchmarks.stub_server import events

ERROR = {"error": {"message": "full", "type": "rate_limit_error", "param": None, "code": "x"}}


def accepted(sent: float) -> Sent:
    pieces = [(sent + i + 1, data) for i, data in enumerate(events([" a", " b"], 1))]
    return Sent(" a", 2, Exchange(sent, 200, None, False, pieces))


def refused(sent: float, status: int = 429, body: object = ERROR, retry: str | None = "1") -> Sent:
    data = json.dumps(body).encode()
    return Sent(" a", 2, Exchange(sent, status, retry, False, [(sent + 0.25, data)]))


def test_refused_and_accepted_are_judged_apart():
    load = Load(0.0, [accepted(0.0), refused(1.0), refused(2.0, 503)], 10.0)
    record = judge(load)
    assert (record["offered"], record["completed"], record["errors"]) == (3, 1, {})
    assert record["refused"] == {"429": 1, "503": 1}
    assert record["refusal_ms"]["p50"] == record["refusal_ms"]["max"] == 250.0
    assert record["itl_ms"]["p50"] == 1000.0
    assert record["malformed"] == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"retry": None},
        {"retry": "soon"},
        {"body": {"detail": "full"}},
        {"body": "full"},
        {"body": {"error": {"message": ""}}},
        {"body": {"error": "full"}},
    ],
)
def test_a_refusal_must_say_why_and_when_to_try_again(wrong):
    assert judge(Load(0.0, [refused(1.0, **wrong)], 10.0))["malformed"] == 1


def test_other_failures_are_errors():
    failed = refused(1.0, 500)
    record = judge(Load(0.0, [failed], 10.0))
    assert record["refused"] == {} and sum(record["errors"].values()) == 1


def test_a_load_has_a_line():
    record = judge(Load(0.0, [accepted(0.0), refused(1.0)], 10.0))
    head, line, row = table([record | {"load": "4 x", "disturbance": None}]).split("\n")
    assert head.count("|") == line.count("|") == row.count("|")
    assert "| 4 x | 2 | 1 | 0 | 1 × 429 | 0 |" in row
