"""The response cache: who gets which answer again, how, and what it takes.

The core gives each new request another answer than the last one, so that an answer which comes a
second time can only have been kept.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.config import ModelOptions
from deployments.ingress.deployment import load_served_model
from deployments.ingress.message_style import MessageStyle
from deployments.ingress.options import IngressOptions
from deployments.ingress.response_cache import CHUNK_TOKENS, Recording, ResponseCache, entry_bytes
from engine.errors import InvalidRequest
from engine.job import Job
from engine.outputs import TokenDelta, TokenLogprobs, refusal
from engine.sampling_params import SamplingParams
from tests.deployments.exchange import Exchange
from tests.deployments.fake_core import FakeCore
from tests.deployments.plane import MAX_MODEL_LEN, Plane, open_plane
from tests.deployments.test_chat_messages import END, TOOLS, repeater

PROMPT = [*range(300, 340)]
FAILS, ENDS = 666, 667
"""A prompt that ends with one of these fails, or is broken off, before it is done."""
GREEDY = {"temperature": 0}
BODY: dict[str, Any] = {"model": "m", "prompt": PROMPT, "max_tokens": 9, **GREEDY}


class MovingCore(FakeCore):
    """Begins its answer one token later for each request whose prompt is one of `PROMPT`'s kind."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._starts: dict[str, int] = {}

    def add(self, wire: Any) -> None:
        super().add(wire)
        self._starts[wire.request_id] = len(self._starts)

    def _advance(self, request: Any) -> TokenDelta:
        at = self._done[request.request_id]
        delta = super()._advance(request)
        prompt = request.prompt_token_ids
        if prompt[0] == PROMPT[0]:
            token = prompt[(at + self._starts[request.request_id]) % len(prompt)]
            delta.token_ids = [token]
        if request.params.logprobs is not None:
            delta.logprobs = [
                TokenLogprobs([t, t + 1, t], [-1.0, -0.5, -1.0], 2) for t in delta.token_ids
            ]
        if request.params.prompt_logprobs is not None and at == 0:
            delta.prompt_logprobs = [TokenLogprobs([t], [-0.25], 1) for t in prompt[1:]]
        if prompt[-1] == FAILS and at == 5:
            del self._requests[request.request_id]
            return refusal(request.request_id, InvalidRequest("it broke."))
        if prompt[-1] == ENDS and at == 5:
            del self._requests[request.request_id]
            delta.finish_reason = "abort"
        delta.num_cached_tokens = 16 if at == 0 else 0
        return delta


@pytest.fixture
async def plane(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Plane]:
    monkeypatch.setattr("tests.deployments.plane.FakeCore", MovingCore)
    async with open_plane(tokenizer=repeater()) as opened:
        opened.model.cache = ResponseCache(2**20)
        yield opened


async def ask(
    plane: Plane, body: dict[str, Any], path: str = "/v1/completions", **headers: str
) -> tuple[str | None, Any]:
    """What the header says, and the answer without what names it."""
    response = await plane.http.post(path, json=body, headers=headers)
    assert response.status_code == 200, response.text
    if response.headers["content-type"] == "application/json":
        answer = [response.json()]
    else:
        data = [line.removeprefix("data: ") for line in response.text.splitlines()]
        answer = [json.loads(d) for d in data if d.startswith("{")]
    for part in answer:
        for name in ("id", "created"):
            part.pop(name, None)
    return response.headers.get("x-cache"), answer


def text_of(chunks: list[dict[str, Any]], index: int = 0) -> str:
    choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
    return "".join(choice["text"] for choice in choices)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"temperature": 1.0, "seed": 5, "n": 2},
        {"temperature": 1.0, "top_k": 1},
        {"logprobs": 2, "prompt_logprobs": 1, "return_token_ids": True, "echo": False},
        {"n": 3, "logprobs": 1},
        {"prompt": [PROMPT, [*PROMPT, 7]]},
        {"max_tokens": 200},
    ],
)
async def test_the_same_answer_comes_again(plane, more):
    first = await ask(plane, BODY | more)
    assert first[0] == "miss"
    assert await ask(plane, BODY | more) == ("hit", first[1])
    assert plane.client.num_running == 0


async def test_streams_and_whole_answers_share_what_is_kept(plane):
    body = BODY | {"max_tokens": 200, "n": 2, "logprobs": 1}
    streaming = body | {"stream": True, "stream_options": {"include_usage": True}}
    how, chunks = await ask(plane, streaming)
    assert how == "miss"
    how, (whole,) = await ask(plane, body)
    assert how == "hit" and whole["usage"] == chunks[-1]["usage"]
    assert whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}
    assert [c["text"] for c in whole["choices"]] == [text_of(chunks, i) for i in (0, 1)]
    how, again = await ask(plane, streaming)
    assert how == "hit" and again[-1] == chunks[-1]
    assert [text_of(again, i) for i in (0, 1)] == [text_of(chunks, i) for i in (0, 1)]
    assert [c["finish_reason"] for c in again[-2]["choices"]] == ["length"]
    found = [c["logprobs"] for chunk in again for c in chunk["choices"] if c["index"] == 1]
    tokens = [token for entry in found if entry for token in entry["tokens"]]
    assert tokens == whole["choices"][1]["logprobs"]["tokens"] and len(tokens) == 200
    assert 2 * 200 / CHUNK_TOKENS < len(again) < 12  # in pieces, but not token by token


def test_scores_of_long_prompts_are_kept_in_pieces_too():
    """Else other streams would wait until all of them were encoded, or decoded, at once."""
    tokens = [*range(1, 4 * CHUNK_TOKENS + 1)]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    job = Job.build("r", {"prompt_token_ids": tokens}, params, 0, None, 10_000, 10_000)
    recording, places = Recording(job), [TokenLogprobs([t], [-1.0], 1) for t in tokens[1:]]
    for begin in range(0, len(places), 100):
        recording.add(TokenDelta("r", [], prompt_logprobs=places[begin : begin + 100]))
    recording.add(TokenDelta("r", [5], "length"))
    entry = recording.entry()
    assert len(entry) == 4
    deltas = [
        delta for chunk in entry for delta in msgspec.msgpack.decode(chunk, type=list[TokenDelta])
    ]
    assert [place for delta in deltas for place in delta.prompt_logprobs or ()] == places


async def test_stop_strings_and_calls_are_found_in_what_is_kept(plane):
    plane.model.style = MessageStyle.of(plane.model.tokenizer, "hermes", None)
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    messages = [{"role": "user", "content": f"So. {call}{END} and more"}]
    body = {"model": "m", "messages": messages, "tools": TOOLS, "stop": END, **GREEDY}
    how, (first,) = await ask(plane, body, "/v1/chat/completions")
    how_again, (again,) = await ask(plane, body, "/v1/chat/completions")
    assert (how, how_again) == ("miss", "hit")
    for answer in (first, again):
        (made,) = answer["choices"][0]["message"].pop("tool_calls")
        assert made["function"] == {"name": "add", "arguments": '{"a": 1}'}
    assert again == first and first["choices"][0]["stop_reason"] == END


async def test_other_endpoints_have_it_too(plane):
    body = {"model": "m", "input": "one two", "max_output_tokens": 4, **GREEDY}
    first = await ask(plane, body, "/v1/responses")
    again = await ask(plane, body, "/v1/responses")
    assert (first[0], again[0]) == ("miss", "hit")
    assert again[1][0]["output"][0]["content"] == first[1][0]["output"][0]["content"]
    body = {"prompt": "three four five", "max_tokens": 3, **GREEDY}
    assert (await ask(plane, body, "/generate_stream"))[0] == "miss"
    assert (await ask(plane, body, "/generate"))[0] == "hit"


@pytest.mark.parametrize(
    "other",
    [
        {"prompt": PROMPT[:-1]},
        {"max_tokens": 8},
        {"n": 2},
        {"logprobs": 0},
        {"stop": "x"},
        {"min_tokens": 3},
        {"logit_bias": {"5": 1.0}},
        {"repetition_penalty": 1.1},
        {"guided_choice": ["a", "b"]},
        {"cache_salt": "mine"},
        {"temperature": 1.0, "seed": 1},
    ],
)
async def test_whatever_decides_the_answer_tells_requests_apart(plane, other):
    await ask(plane, BODY)
    assert (await ask(plane, BODY | other))[0] == "miss"
    assert (await ask(plane, BODY))[0] == "hit"


@pytest.mark.parametrize(
    "other", [{"seed": 7}, {"priority": 3}, {"user": "u"}, {"prompt": "as text"}]
)
async def test_what_decides_nothing_does_not(plane, other):
    body = BODY | ({"prompt": plane.model.tokenizer.encode("as text")} if "prompt" in other else {})
    first = await ask(plane, body)
    assert await ask(plane, body | other) == ("hit", first[1])


async def test_seeds_tell_requests_apart_that_draw(plane):
    for seed in (1, 2):
        assert (await ask(plane, BODY | {"temperature": 1.0, "seed": seed}))[0] == "miss"


async def test_what_draws_without_a_seed_is_not_asked_for(plane):
    for _ in range(2):
        assert (await ask(plane, BODY | {"temperature": 1.0}))[0] is None
    assert len(plane.model.cache) == plane.model.cache.num_queries == 0


async def test_it_is_off_by_default():
    assert IngressOptions().response_cache_bytes == 0
    async with open_plane() as plane:
        for _ in range(2):
            assert (await ask(plane, BODY))[0] is None


def test_the_option_says_how_much_a_model_may_keep():
    options = IngressOptions(response_cache_bytes=12345)
    client: Any = None
    model = load_served_model("m", ModelOptions(), options, client)
    assert model.cache.max_bytes == 12345


async def test_of_many_prompts_only_the_new_ones_are_computed(plane):
    known = await ask(plane, BODY)
    longer = [*PROMPT, 7]
    how, (answer,) = await ask(plane, BODY | {"prompt": [longer, PROMPT, longer[:-2]]})
    assert how == "miss"
    assert answer["choices"][1]["text"] == known[1][0]["choices"][0]["text"]
    assert answer["usage"]["completion_tokens"] == 27
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * 3
    assert plane.model.cache.num_hits == 1 and len(plane.model.cache) == 3


async def test_keys_never_hear_of_one_another(monkeypatch):
    monkeypatch.setenv("TRUNKLINE_API_KEYS", "sk-a,sk-b")
    async with open_plane() as plane:
        plane.model.cache = ResponseCache(2**20)
        told = [
            (await ask(plane, BODY, Authorization=f"Bearer {key}"))[0]
            for key in ("sk-a", "sk-b", "sk-a", "sk-b")
        ]
    assert told == ["miss", "miss", "hit", "hit"]


@pytest.mark.parametrize("stream", [False, True])
async def test_what_was_broken_off_is_not_kept(monkeypatch, stream):
    async with open_plane(step_s=0.05) as plane:
        plane.model.cache = ResponseCache(2**20)
        exchange = Exchange(plane.app, {"content-type": "application/json"})
        body = BODY | {"max_tokens": MAX_MODEL_LEN - len(PROMPT), "stream": stream}
        exchange.feed(json.dumps(body).encode(), more=False)
        await plane.until(lambda: any(view.load.num_running for view in plane.view()))
        exchange.leave()
        await exchange.task
        await plane.idle()
        assert len(plane.model.cache) == 0 and plane.model.cache.num_queries == 1


async def test_what_failed_is_not_kept_nor_what_came_with_it(plane):
    prompts = [[*PROMPT], [*PROMPT, FAILS]]
    for count in (1, 2):
        response = await plane.http.post("/v1/completions", json=BODY | {"prompt": prompts})
        assert response.status_code == 400
        assert (len(plane.model.cache), plane.model.cache.num_queries) == (0, 2 * count)


async def test_what_an_engine_broke_off_is_not_kept(plane):
    for _ in range(2):
        how, (answer,) = await ask(plane, BODY | {"prompt": [*PROMPT, ENDS]})
        assert (how, answer["choices"][0]["finish_reason"]) == ("miss", "abort")


async def test_the_page_of_metrics_counts_hits(plane):
    for _ in range(3):
        await ask(plane, BODY)
    page = (await plane.http.get("/metrics")).text
    samples = dict(line.rsplit(" ", 1) for line in page.splitlines() if "response_cache" in line)
    found = {name.partition("{")[0]: value for name, value in samples.items() if "{" in name}
    assert found["trunkline_response_cache_queries_total"] == "3"
    assert found["trunkline_response_cache_hits_total"] == "2"
    assert int(found["trunkline_response_cache_bytes"]) == plane.model.cache.num_bytes > 0


async def test_many_at_once(plane):
    await ask(plane, BODY | {"max_tokens": 200})
    answers = await asyncio.gather(*[ask(plane, BODY | {"max_tokens": 200}) for _ in range(20)])
    assert all(answer == answers[0] for answer in answers) and answers[0][0] == "hit"


ENTRIES = st.lists(st.binary(max_size=600), max_size=4).map(tuple)
CALLS = st.lists(st.tuples(st.integers(0, 9), st.none() | ENTRIES), max_size=60)


@settings(deadline=None)
@given(max_bytes=st.integers(0, 8000), calls=CALLS)
def test_no_more_is_kept_than_may_be_and_the_oldest_goes_first(max_bytes, calls):
    cache, model = ResponseCache(max_bytes), {}
    for number, entry in calls:
        key = number.to_bytes(32)
        if entry is None:
            assert cache.get(key) == model.get(key)
            if key in model:
                model[key] = model.pop(key)
        elif entry_bytes(entry) <= max_bytes:
            cache.put(key, entry)
            model.pop(key, None)
            model[key] = entry
            while sum(map(entry_bytes, model.values())) > max_bytes:
                del model[next(iter(model))]
        else:
            cache.put(key, entry)
        assert dict(cache._entries) == model and list(cache._entries) == list(model)
        assert cache.num_bytes == sum(map(entry_bytes, model.values())) <= max_bytes
        assert memory(cache) <= cache.num_bytes + sys.getsizeof({})


def memory(cache: ResponseCache) -> int:
    """What Python says that the entries take: keys, values and their places."""
    sizes = sys.getsizeof(dict(cache._entries))
    for key, entry in cache._entries.items():
        sizes += sys.getsizeof(key) + sys.getsizeof(entry) + sum(map(sys.getsizeof, entry))
    return sizes
