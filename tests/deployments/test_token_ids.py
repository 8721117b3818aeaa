"""Token ids in answers, and prompts that are cut to their end."""

from __future__ import annotations

from typing import Any

import pytest

from deployments.ingress.message_style import MessageStyle
from tests.deployments.fake_core import expected_tokens
from tests.deployments.plane import (
    MAX_MODEL_LEN,
    PROMPT,
    bundled_tokenizer,
    echo,
    events,
)

IDS = bundled_tokenizer().encode(PROMPT)
CHAT = [{"role": "user", "content": "hi"}]
CHAT_IDS = bundled_tokenizer().encode_chat(CHAT)


async def post(plane: Any, path: str, **body: Any) -> Any:
    response = await plane.http.post(path, json={"model": "m", **body})
    assert response.status_code == 200, response.text
    return events(response.text) if body.get("stream") else response.json()


async def test_completions_tell_token_ids(plane):
    body = {"prompt": [PROMPT, "alpha beta"], "max_tokens": 6, "return_token_ids": True, "n": 2}
    prompts = [IDS] * 2 + [bundled_tokenizer().encode("alpha beta")] * 2
    choices = (await post(plane, "/v1/completions", **body))["choices"]
    assert [c["prompt_token_ids"] for c in choices] == prompts
    assert [c["token_ids"] for c in choices] == [expected_tokens(p, 6) for p in prompts]
    told: list[list[int]] = [[], [], [], []]
    begun = {}
    for chunk in await post(plane, "/v1/completions", **body, stream=True):
        (choice,) = chunk["choices"]
        told[choice["index"]] += choice["token_ids"]
        assert ("prompt_token_ids" in choice) is (choice["index"] not in begun)
        begun.setdefault(choice["index"], choice.get("prompt_token_ids"))
    assert told == [expected_tokens(p, 6) for p in prompts]
    assert [begun[i] for i in range(4)] == prompts


@pytest.mark.parametrize("reasoning", [None, "qwen3"])
async def test_chats_tell_token_ids(plane, reasoning):
    plane.model.style = MessageStyle.of(plane.model.tokenizer, None, reasoning)
    body = {"messages": CHAT, "max_tokens": 20, "return_token_ids": True}
    answer = await post(plane, "/v1/chat/completions", **body)
    assert answer["prompt_token_ids"] == CHAT_IDS
    assert answer["choices"][0]["token_ids"] == expected_tokens(CHAT_IDS, 20)
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    first, *chunks = await post(plane, "/v1/chat/completions", **body)
    assert (first["prompt_token_ids"], first["usage"]) == (CHAT_IDS, None)
    assert chunks.pop()["usage"]["completion_tokens"] == 20
    told = [i for c in [first, *chunks] for i in c["choices"][0]["token_ids"]]
    assert told == expected_tokens(CHAT_IDS, 20)
    assert all("prompt_token_ids" not in c for c in chunks)


async def test_nobody_else_is_told(plane):
    answer = await post(plane, "/v1/completions", prompt=PROMPT, max_tokens=2)
    assert "token_ids" not in answer["choices"][0]
    chunks = await post(plane, "/v1/chat/completions", messages=CHAT, max_tokens=2, stream=True)
    assert all("token_ids" not in chunk["choices"][0] for chunk in chunks)


@pytest.mark.parametrize("prompt", [PROMPT, IDS])
async def test_a_prompt_keeps_its_last_tokens(plane, prompt):
    body = {"prompt": prompt, "max_tokens": 2, "truncate_prompt_tokens": 2, "echo": True}
    answer = await post(plane, "/v1/completions", **body)
    assert answer["usage"]["prompt_tokens"] == 2
    assert answer["choices"][0]["text"] == " three four" + " three four"
    answer = await post(plane, "/v1/completions", **{**body, "truncate_prompt_tokens": 9})
    assert answer["choices"][0]["text"] == PROMPT + echo(PROMPT, 2)
    body = {"messages": CHAT, "max_tokens": 1, "truncate_prompt_tokens": 3}
    assert (await post(plane, "/v1/chat/completions", **body))["usage"]["prompt_tokens"] == 3


async def test_a_prompt_leaves_room_for_the_output(plane):
    body = {"prompt": "word " * 400, "max_tokens": 50, "truncate_prompt_tokens": -1}
    answer = await post(plane, "/v1/completions", **body)
    assert answer["usage"]["prompt_tokens"] == MAX_MODEL_LEN - 50


@pytest.mark.parametrize("value", [0, -2, MAX_MODEL_LEN, "1", 1.5])
async def test_other_lengths_are_refused(plane, value):
    for path, prompt in (
        ("completions", {"prompt": "a"}),
        ("chat/completions", {"messages": CHAT}),
    ):
        body = {"model": "m", **prompt, "truncate_prompt_tokens": value}
        response = await plane.http.post(f"/v1/{path}", json=body)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "truncate_prompt_tokens"
