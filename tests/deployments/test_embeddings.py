"""`/v1/embeddings` on the plane without Ray."""

from __future__ import annotations

import asyncio
from base64 import b64decode
from typing import Any

import numpy as np
import pytest

from deployments.ingress import embeddings
from deployments.ingress.response_cache import ResponseCache
from engine.embedding import POOLED_PARAMS
from engine.request import EngineRequest
from tests.deployments.fake_core import FakeInfo, expected_states
from tests.deployments.plane import MAX_MODEL_LEN, Plane, bundled_tokenizer, open_plane

TEXT = "one two three four"
WIDTH = FakeInfo.hidden_size


async def embed(plane: Plane, path: str = "/v1/embeddings", **body: Any) -> dict[str, Any]:
    response = await plane.http.post(path, json={"model": "m", **body})
    assert response.status_code == 200, response.text
    answer = response.json()
    assert (answer["object"], answer["model"]) == ("list", "m")
    assert [item["object"] for item in answer["data"]] == ["embedding"] * len(answer["data"])
    assert [item["index"] for item in answer["data"]] == list(range(len(answer["data"])))
    return answer


def vectors(answer: dict[str, Any]) -> list[list[float]]:
    return [item["embedding"] for item in answer["data"]]


def expected(prompt: str | list[int], dimensions: int = WIDTH, pooling: str = "last") -> Any:
    ids = bundled_tokenizer().encode(prompt) if isinstance(prompt, str) else prompt
    kept = expected_states(ids, pooling)[:dimensions]
    return pytest.approx((kept / np.linalg.norm(kept)).tolist(), rel=1e-6)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embeddings"])
@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        (TEXT, [TEXT]),
        ([TEXT, "five"], [TEXT, "five"]),
        ([3, 4, 5], [[3, 4, 5]]),
        ([[3, 4], [5]], [[3, 4], [5]]),
    ],
)
async def test_all_forms_of_input(plane, path, given, prompts):
    answer = await embed(plane, path, input=given, user="u")
    assert vectors(answer) == [expected(prompt) for prompt in prompts]
    encode = bundled_tokenizer().encode
    count = sum(len(encode(p) if isinstance(p, str) else p) for p in prompts)
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == count


@pytest.mark.parametrize("in_thread", [False, True])
async def test_base64_is_the_same_numbers(plane, monkeypatch, in_thread):
    monkeypatch.setattr(embeddings, "LONG_ANSWER", 0 if in_thread else 10**9)
    body = {"input": [TEXT, "five"]}
    floats = vectors(await embed(plane, **body, encoding_format="float"))
    coded = vectors(await embed(plane, **body, encoding_format="base64"))
    assert [np.frombuffer(b64decode(text), "<f4").tolist() for text in coded] == floats


async def test_options(plane):
    assert vectors(await embed(plane, input=TEXT, dimensions=3)) == [expected(TEXT, 3)]
    (raw,) = vectors(await embed(plane, input=[7], normalize=False, dimensions=WIDTH))
    assert raw == expected_states([7], "last").tolist()
    answer = await embed(plane, input=[3, 4, 5], truncate_prompt_tokens=2)
    assert answer["usage"]["prompt_tokens"] == 2
    answer = await embed(plane, input=[3] * 1000, truncate_prompt_tokens=-1)
    assert answer["usage"]["prompt_tokens"] == MAX_MODEL_LEN
    plane.model.pooling = "mean"
    assert vectors(await embed(plane, input=[3, 4, 8])) == [expected([3, 4, 8], pooling="mean")]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [3, "a"]}, "input"),
        ({"input": {"a": 1}}, "input"),
        ({"input": [49152]}, "input"),
        ({"input": [[1], [-1]]}, "input"),
        ({"input": [3] * (MAX_MODEL_LEN + 1)}, "input"),
        ({"input": "word " * 500}, "input"),
        ({"input": "a" * 20_000}, "input"),
        ({"input": ["a"] * 65}, "input"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": WIDTH + 1}, "dimensions"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "a", "truncate_prompt_tokens": 10**6}, "truncate_prompt_tokens"),
        ({"input": "a", "priority": "high"}, "priority"),
        ({"input": "a", "messages": [{}]}, "messages"),
        ({"input": "a", "embed_dtype": "float16"}, "embed_dtype"),
    ],
)
async def test_bad_input_names_the_field(plane, body, param):
    response = await plane.http.post("/v1/embeddings", json={"model": "m", **body})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert plane.model.num_preparing == plane.client.num_running == 0


async def test_an_input_may_fill_the_model(plane):
    answer = await embed(plane, input=[[3] * (MAX_MODEL_LEN - 1), [4] * MAX_MODEL_LEN])
    assert vectors(answer) == [expected([3]), expected([4])]


async def test_counts(plane):
    await embed(plane, input=[[3, 4], [5]])
    counts = plane.model.counts
    assert (counts.prompt_tokens.total, counts.generated_tokens.total) == (3, 0)
    assert +counts.ended == {"stop": 2}
    assert (sum(counts.latency_s.counts), sum(counts.first_token_s.counts)) == (2, 0)


async def test_beside_generation(plane):
    body = {"model": "m", "prompt": TEXT, "max_tokens": 40}
    alone = (await plane.http.post("/v1/completions", json=body)).json()["choices"]
    among, *answers = await asyncio.gather(
        plane.http.post("/v1/completions", json=body),
        *(embed(plane, input=[TEXT, "five"]) for _ in range(8)),
    )
    assert among.json()["choices"] == alone
    assert [vectors(answer) for answer in answers] == [[expected(TEXT), expected("five")]] * 8


async def test_goes_on_elsewhere_when_its_engine_is_lost(most):
    def busy() -> list[str]:
        return [v.engine_id for v in plane.view() if v.num_booked or v.load.num_running]

    most[""] = 0
    async with open_plane(num_engines=2, step_s=0.005) as plane:
        asked = asyncio.create_task(embed(plane, input=TEXT))
        await plane.until(busy)
        (lost,) = busy()
        await plane.cut(lost)
        most.clear()
        assert vectors(await asked) == [expected(TEXT)]
        await plane.idle()


async def test_the_response_cache_tells_them_from_tokens_and_from_each_other(plane):
    plane.model.cache = ResponseCache(2**20)
    completion = {"model": "m", "prompt": [3, 4, 8], "max_tokens": 1, "temperature": 0, "seed": 0}
    for _ in range(2):
        text = (await plane.http.post("/v1/completions", json=completion)).json()["choices"]
        assert text[0]["finish_reason"] == "length"
        for pooling in ("last", "mean"):
            plane.model.pooling = pooling
            answer = await embed(plane, input=[3, 4, 8])
            assert vectors(answer) == [expected([3, 4, 8], pooling=pooling)]
    assert plane.model.cache.num_hits == 3


def test_a_mean_is_not_routed_by_what_caches_hold():
    """They hold no hidden states."""
    for pooling, whole in ((None, False), ("last", False), ("mean", True)):
        request = EngineRequest("r", [1], POOLED_PARAMS, pooling=pooling)
        assert request.computes_whole_prompt == whole
