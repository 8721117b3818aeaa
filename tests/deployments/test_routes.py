"""What the endpoints answer, on the plane without Ray."""

from __future__ import annotations

import asyncio

import pytest
import tokenizers

from engine.tokenizer import Tokenizer
from tests.deployments.fake_core import expected_tokens
from tests.deployments.plane import (
    CHAT,
    MAX_MODEL_LEN,
    PROMPT,
    bundled_tokenizer,
    echo,
    events,
    open_plane,
)


async def test_completion(plane):
    body = {"model": "m", "prompt": PROMPT, "max_tokens": 6}
    answer = (await plane.http.post("/v1/completions", json=body)).json()
    assert answer["object"] == "text_completion"
    assert answer["choices"][0]["text"] == echo(PROMPT, 6)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 6
    assert answer["usage"]["prompt_tokens"] == 4


async def test_streamed_completion_says_the_same(plane):
    body = {"model": "m", "prompt": PROMPT, "max_tokens": 6, "stream": True}
    body["stream_options"] = {"include_usage": True}
    response = await plane.http.post("/v1/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response.text)
    usage = chunks.pop()
    assert "".join(c["choices"][0]["text"] for c in chunks) == echo(PROMPT, 6)
    assert [c["choices"][0]["finish_reason"] for c in chunks][-1] == "length"
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 6
    assert {c["id"] for c in chunks} == {usage["id"]}


async def test_many_prompts_and_completions_keep_their_places(plane):
    body = {"model": "m", "prompt": [PROMPT, "alpha beta"], "n": 2, "max_tokens": 5}
    answer = (await plane.http.post("/v1/completions", json=body)).json()
    texts = [c["text"] for c in sorted(answer["choices"], key=lambda c: c["index"])]
    assert texts == [echo(PROMPT, 5)] * 2 + [echo("alpha beta", 5)] * 2


async def test_token_ids_as_prompt_and_echo(plane):
    ids = bundled_tokenizer().encode(PROMPT)
    body = {"model": "m", "prompt": ids, "max_tokens": 4}
    answer = (await plane.http.post("/v1/completions", json=body)).json()
    assert answer["choices"][0]["text"] == echo(PROMPT, 4)
    body = {"model": "m", "prompt": PROMPT, "max_tokens": 4, "echo": True}
    answer = (await plane.http.post("/v1/completions", json=body)).json()
    assert answer["choices"][0]["text"] == PROMPT + echo(PROMPT, 4)


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_of_token_ids_is_their_text(plane, stream):
    prompts = ["<|im_start|>one two", "three"]
    ids = [bundled_tokenizer().encode(prompt) for prompt in prompts]
    body = {"model": "m", "prompt": ids, "max_tokens": 1, "echo": True, "stream": stream}
    response = await plane.http.post("/v1/completions", json=body)
    answers = events(response.text) if stream else [response.json()]
    texts = ["", ""]
    for choice in (c for answer in answers for c in answer["choices"]):
        texts[choice["index"]] += choice["text"]
    assert texts == ["<|im_start|>one two", "threethree"]


@pytest.mark.parametrize(("add", "num_tokens"), [(None, 5), (True, 5), (False, 4)])
async def test_add_special_tokens(add, num_tokens):
    backend = tokenizers.Tokenizer.from_str(bundled_tokenizer()._backend.to_str())
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    async with open_plane(tokenizer=Tokenizer(backend)) as plane:
        body = {"model": "m", "prompt": PROMPT, "max_tokens": 1, "echo": True}
        body |= {} if add is None else {"add_special_tokens": add}
        answer = (await plane.http.post("/v1/completions", json=body)).json()
        assert answer["usage"]["prompt_tokens"] == num_tokens
        assert answer["choices"][0]["text"].startswith(PROMPT)


async def test_chat(plane):
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    answer = (await plane.http.post("/v1/chat/completions", json=body)).json()
    prompt = bundled_tokenizer().encode_chat(body["messages"])
    expected = bundled_tokenizer().decode(expected_tokens(prompt, 3))
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": expected}
    body["stream"] = True
    chunks = events((await plane.http.post("/v1/chat/completions", json=body)).text)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert "".join(d.get("content", "") for d in deltas) == expected


async def test_chat_needs_no_limit(plane):
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stop": [" AI"]}
    answer = (await plane.http.post("/v1/chat/completions", json=body)).json()
    assert answer["choices"][0]["finish_reason"] == "stop"


async def test_stop_string_ends_the_request_at_the_engine(plane):
    body = {"model": "m", "prompt": PROMPT, "max_tokens": 200, "stop": " three"}
    answer = (await plane.http.post("/v1/completions", json=body)).json()
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("one two", "stop")
    assert choice["stop_reason"] == " three"
    await plane.idle()
    assert plane.client.num_running == 0


async def test_simple_endpoints(plane):
    answer = (await plane.http.post("/generate", json={"prompt": PROMPT, "max_tokens": 4})).json()
    assert answer["text"] == echo(PROMPT, 4)
    body = {"prompts": [PROMPT, "a b c"], "max_tokens": 4}
    answer = (await plane.http.post("/batch_generate", json=body)).json()
    assert answer["texts"] == [echo(PROMPT, 4), echo("a b c", 4)]
    body = {"prompt": PROMPT, "max_tokens": 4}
    parts = events((await plane.http.post("/generate_stream", json=body)).text)
    assert "".join(p["text"] for p in parts) == echo(PROMPT, 4)
    assert parts[-1]["finished"]


async def test_models_and_health(plane):
    listed = (await plane.http.get("/v1/models")).json()
    assert [m["id"] for m in listed["data"]] == ["m"]
    assert (await plane.http.get("/v1/models/m")).json()["max_model_len"] == MAX_MODEL_LEN
    health = await plane.http.get("/health")
    assert health.status_code == 200
    assert health.json()["status"] == "ok"
    assert health.json()["engines"][0]["free_blocks"] == 4096


@pytest.mark.parametrize("more", [{}, {"max_tokens": 6}, {"max_tokens": None}])
async def test_an_output_may_fill_what_the_prompt_leaves(plane, more):
    body = {"model": "m", "prompt": [5] * (MAX_MODEL_LEN - 6), **more}
    answer = await plane.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text


async def test_no_alternatives_need_no_logprobs(plane):
    """Clients send the defaults of both."""
    body = {**CHAT, "logprobs": False, "top_logprobs": 0}
    assert (await plane.http.post("/v1/chat/completions", json=body)).status_code == 200


async def test_chat_template_of_trusted_clients(plane):
    plane.model.allow_request_chat_templates = True
    body = {**CHAT, "chat_template": "{{ messages[0].content }} {{ more }}", "max_tokens": 6}
    body["chat_template_kwargs"] = {"more": "alpha beta"}
    answer = (await plane.http.post("/v1/chat/completions", json=body)).json()
    assert answer["choices"][0]["message"]["content"] == echo("hi alpha beta", 6)
    response = await plane.http.post(
        "/v1/chat/completions", json={**CHAT, "chat_template": "{% bad"}
    )
    assert (response.status_code, response.json()["error"]["param"]) == (400, "chat_template")


async def test_streams_are_not_mixed_up(plane):
    prompts = [f"request number {i} has its own words" for i in range(24)]

    async def one(prompt: str) -> str:
        body = {"model": "m", "prompt": prompt, "max_tokens": 20, "stream": True}
        parts = events((await plane.http.post("/v1/completions", json=body)).text)
        return "".join(c["choices"][0]["text"] for c in parts)

    texts = await asyncio.gather(*map(one, prompts))
    assert texts == [echo(prompt, 20) for prompt in prompts]
