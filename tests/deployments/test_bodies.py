"""Request bodies: which are taken, and that wrong ones cost no more than right ones."""

from __future__ import annotations

import json
import threading
import tracemalloc
from typing import Any

import pytest

from deployments.protocols import body as bodies
from deployments.protocols.body import LONG_BODY, parse_body, read_body
from deployments.protocols.openai import ChatBody, CompletionBody
from deployments.protocols.simple import BatchGenerateBody
from engine.errors import InvalidRequest

MANY = 20_000


def completion(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "prompt": "hi", **fields}).encode()


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        ([[], [1]], [[], [1]]),
    ],
)
def test_forms_of_a_prompt(prompt, prompts):
    assert parse_body(CompletionBody, completion(prompt=prompt)).prompts() == prompts


@pytest.mark.parametrize(
    "prompt",
    [5, True, 1.5, None, {}, [True], [1.5], ["a", 1], [1, "a"], [[1], "a"], [["a"]], [[True]]],
)
def test_other_forms_are_refused(prompt):
    with pytest.raises(InvalidRequest, match=r"^prompt: must be .*\.$") as caught:
        parse_body(CompletionBody, completion(prompt=prompt))
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (CompletionBody, "prompt", [1.5] * MANY),
        (CompletionBody, "prompt", [[1.5]] * MANY),
        (CompletionBody, "stop", [1] * MANY),
        (CompletionBody, "stop_token_ids", ["a"] * MANY),
        (CompletionBody, "logit_bias", {str(i): "a" for i in range(MANY)}),
        (BatchGenerateBody, "prompts", [1] * MANY),
        (ChatBody, "messages", ["a"] * MANY),
    ],
)
def test_one_error_is_found_not_one_for_each_element(kind, field, value):
    values = {"model": "m", "prompt": "hi", "prompts": ["hi"], "messages": [{"role": "user"}]}
    data = json.dumps({**values, field: value}).encode()
    tracemalloc.start()
    json.loads(data)
    decoded = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    try:
        with pytest.raises(InvalidRequest) as caught:
            parse_body(kind, data).to_params()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.param == field
    assert peak < 3 * decoded + 2**20


async def test_long_bodies_are_parsed_in_a_thread(monkeypatch):
    threads: list[int] = []

    def spy(kind: Any, data: bytes) -> Any:
        threads.append(threading.get_ident())
        return parse_body(kind, data)

    monkeypatch.setattr(bodies, "parse_body", spy)
    short, long = completion(), completion(prompt="x" * LONG_BODY)
    assert (await read_body(CompletionBody, short)).prompt == "hi"
    assert len((await read_body(CompletionBody, long)).prompt) == LONG_BODY
    here = threading.get_ident()
    assert [thread == here for thread in threads] == [True, False]
