"""`usage` in every chunk of a stream, for `continuous_usage_stats`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

from deployments.ingress import answers
from deployments.ingress.answers import usage
from engine.job import Job
from engine.outputs import TokenDelta
from engine.request import EngineRequest
from tests.deployments.fake_core import FakeCore
from tests.deployments.plane import PROMPT, bundled_tokenizer, events

CHAT = [{"role": "user", "content": "hi"}]
OPTIONS = {"include_usage": True, "continuous_usage_stats": True}


@pytest.mark.parametrize("more", [{}, {"return_token_ids": True}])
async def test_every_chunk_tells_what_was_generated_up_to_it(plane, more):
    body = {"prompt": [PROMPT, "alpha beta"], "n": 2, "max_tokens": 5, "stream": True, **more}
    body |= {"model": "m", "stream_options": OPTIONS}
    chunks = events((await plane.http.post("/v1/completions", json=body)).text)
    prompt = sum(len(bundled_tokenizer().encode(text)) for text in body["prompt"])
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {prompt}
    generated = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert all(a <= b for a, b in pairwise(generated)) and generated[-1] == generated[-2] == 20
    totals = [chunk["usage"]["total_tokens"] for chunk in chunks]
    assert totals == [prompt + count for count in generated]
    if more:
        told = [len(chunk["choices"][0]["token_ids"]) for chunk in chunks[:-1]]
        assert generated[:-1] == [sum(told[: count + 1]) for count in range(len(told))]


async def test_cached_tokens_are_told_as_soon_as_they_are_known(plane, monkeypatch):
    advance = FakeCore._advance

    def cached(core: FakeCore, request: EngineRequest) -> TokenDelta:
        delta = advance(core, request)
        delta.num_cached_tokens = 3
        return delta

    monkeypatch.setattr(FakeCore, "_advance", cached)
    body = {"model": "m", "messages": CHAT, "max_tokens": 4, "n": 2, "stream": True}
    response = await plane.http.post(
        "/v1/chat/completions", json={**body, "stream_options": OPTIONS}
    )
    chunks = events(response.text)
    assert chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    told = [c["usage"]["prompt_tokens_details"]["cached_tokens"] for c in chunks]
    assert told == sorted(told) and told[-2] == 3


async def test_a_chunk_takes_no_longer_where_there_are_many_prompts(plane, monkeypatch):
    """Jobs are added up once at the end, not for each chunk."""
    plane.model.max_concurrent_requests = 100
    counted: list[int] = []

    def count(jobs: Sequence[Job]) -> dict[str, Any]:
        counted.append(len(jobs))
        return usage(jobs)

    monkeypatch.setattr(answers, "usage", count)
    body = {"model": "m", "prompt": [[5]] * 100, "max_tokens": 3, "stream": True}
    response = await plane.http.post("/v1/completions", json={**body, "stream_options": OPTIONS})
    assert len(events(response.text)) > 100
    assert sum(counted) <= 200
