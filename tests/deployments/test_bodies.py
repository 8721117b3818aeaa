"""Request bodies: which are taken, and that wrong ones cost no more than right ones."""

from __future__ import annotations

import json
import threading
import tracemalloc
from typing import Any

import pytest

from deployments.protocols import body as bodies
from deployments.protocols.body import LONG_BODY, MAX_DEPTH, parse_body, read_body
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


def nested(depth: int) -> Any:
    """A list with `depth` lists in one another."""
    return [] if depth == 1 else [nested(depth - 1)]


def test_deep_bodies_are_refused():
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    for fits, depth in ((True, MAX_DEPTH - 2), (False, MAX_DEPTH - 1), (False, 900)):
        # The body and the keywords are a level each.
        data = json.dumps({**body, "chat_template_kwargs": {"x": nested(depth)}}).encode()
        if fits:
            parse_body(ChatBody, data)
            continue
        with pytest.raises(InvalidRequest, match="more than 32 deep"):
            parse_body(ChatBody, data)


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
@pytest.mark.parametrize("depth", [1_000, 100_000])
def test_bodies_too_deep_for_the_parser_are_refused(opening, closing, depth):
    whole = f'{{"model":"m","messages":{opening * depth}1{closing * depth}}}'
    for text in (whole, whole[: len(whole) // 2]):
        with pytest.raises(InvalidRequest, match=r"not valid JSON|deep"):
            parse_body(ChatBody, text.encode())


def test_many_flat_lists_are_taken():
    data = completion(prompt=[[1, 2]] * 1000)
    assert len(parse_body(CompletionBody, data).prompts()) == 1000
    assert parse_body(CompletionBody, completion(prompt="[{" * 1000)).prompts() == ["[{" * 1000]


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
