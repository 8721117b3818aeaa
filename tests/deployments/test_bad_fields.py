"""Requests that are wrong are refused by the name of their field, on the plane without Ray."""

from __future__ import annotations

import json

import pytest

from engine.tokenizer import Tokenizer
from tests.deployments.plane import (
    CHAT,
    COMPLETION,
    MAX_MODEL_LEN,
    PROMPT,
    bundled_tokenizer,
    open_plane,
)


@pytest.mark.parametrize("field", ["logprobs", "prompt_logprobs"])
async def test_simple_endpoints_refuse_logprobs(plane, field):
    for path in ("/generate", "/generate_stream", "/batch_generate"):
        body = {"prompt": PROMPT, "prompts": [PROMPT], field: 1}
        response = await plane.http.post(path, json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, field)


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/batch_generate"])
async def test_simple_endpoints_refuse_outputs_without_room(plane, path):
    body = {"prompts" if "batch" in path else "prompt": PROMPT, "max_tokens": MAX_MODEL_LEN}
    body = {name: [value] if name == "prompts" else value for name, value in body.items()}
    answer = await plane.http.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "max_tokens")
    assert plane.client.num_running == 0


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": "2"}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1_0": 1}}, "logit_bias"),
        ({"logit_bias": {" 1": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"logprobs": 999}, "logprobs"),
        ({"stop": 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [49152]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "long " * MAX_MODEL_LEN}, "prompt"),
        ({"model": 5}, "model"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"response_format": "json_object"}, "response_format"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "json": "{}"}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs"),
        ({"guided_json": {"uniqueItems": True}}, "guided_json"),
        ({"guided_json": {"allOf": None}}, "guided_json"),
        ({"guided_json": '{"type":'}, "guided_json"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_choice": [1]}, "guided_choice"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_grammar": ["a"]}, "guided_grammar"),
        ({"guided_regex": "a", "structured_outputs": {"regex": "a"}}, "guided_regex"),
        ({"echo": True, "logprobs": 21}, "logprobs"),
        ({"max_tokens": 0, "logprobs": 1}, "max_tokens"),
        ({"max_tokens": -1, "echo": True}, "max_tokens"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [49152]}, "allowed_token_ids"),
        ({"allowed_token_ids": ["5"]}, "allowed_token_ids"),
        ({"allowed_token_ids": 5}, "allowed_token_ids"),
        ({"allowed_token_ids": list(range(1025))}, "allowed_token_ids"),
        ({"bad_words": "bad"}, "bad_words"),
        ({"bad_words": [""]}, "bad_words"),
        ({"bad_words": ["long " * 17]}, "bad_words"),
        ({"bad_words": ["word"] * 257}, "bad_words"),
        ({"bad_words": [5]}, "bad_words"),
        ({"length_penalty": 0.5}, "length_penalty"),
        ({"kv_transfer_params": {"a": 1}}, "kv_transfer_params"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"max_tokens": MAX_MODEL_LEN}, "max_tokens"),
        ({"prompt": ["hi", "long " * 200], "max_tokens": 100}, "max_tokens"),
    ],
)
async def test_bad_field_is_named(plane, change, param):
    content = json.dumps({**COMPLETION, **change})
    response = await plane.http.post("/v1/completions", content=content)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert error["type"] == "invalid_request_error"
    assert error["message"].endswith(".") and "Traceback" not in error["message"]
    good = await plane.http.post("/v1/completions", json=COMPLETION)
    assert good.status_code == 200


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "hi"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "long " * MAX_MODEL_LEN}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 99}, "top_logprobs"),
        ({"max_completion_tokens": 0, "max_tokens": None}, "max_completion_tokens"),
        ({"max_completion_tokens": 5}, "max_tokens"),
        ({"max_tokens": MAX_MODEL_LEN}, "max_tokens"),
        (
            {"max_completion_tokens": MAX_MODEL_LEN, "max_tokens": None},
            "max_completion_tokens",
        ),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"stream": True, "prompt_logprobs": 0}, "prompt_logprobs"),
        ({"add_special_tokens": True}, "add_special_tokens"),
        ({"chat_template": "{{ 'ab ' * 5000000 }}"}, "chat_template"),
        ({"chat_template": ""}, "chat_template"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"add_generation_prompt": True}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"continue_final_message": True}}, "chat_template_kwargs"),
    ],
)
async def test_bad_chat_field_is_named(plane, change, param):
    response = await plane.http.post("/v1/chat/completions", json={**CHAT, **change})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_names_of_fields_are_spelled_as_they_are(plane):
    for change, begin in (
        ({"messages": [{"role": "assistant", "tool_calls": [5]}]}, "tool_calls in messages"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_json and guided_regex"),
        ({"messages": [5]}, "messages: "),
        ({"messages": [{"role": "user", "content": 5}]}, "Content must be text"),
    ):
        answer = await plane.http.post("/v1/chat/completions", json={**CHAT, **change})
        assert answer.json()["error"]["message"].startswith(begin)


@pytest.mark.parametrize(
    ("path", "asks"),
    [
        ("/v1/chat/completions", {"messages": CHAT["messages"]}),
        ("/generate", {"prompt": "hi"}),
        ("/v1/responses", {"input": "hi", "max_output_tokens": 2}),
    ],
)
@pytest.mark.parametrize(
    ("field", "value", "harmless"), [("best_of", 2, 1), ("use_beam_search", True, False)]
)
async def test_other_ways_to_search_are_refused_everywhere(
    plane, path, asks, field, value, harmless
):
    body = {"model": "m", **asks}
    response = await plane.http.post(path, json={**body, field: value})
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)
    assert (await plane.http.post(path, json={**body, field: harmless})).status_code == 200


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"n":' + b"9" * 5000],
)
async def test_malformed_json(plane, content):
    response = await plane.http.post("/v1/completions", content=content)
    assert response.status_code in (400, 413)
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_unknown_things(plane):
    response = await plane.http.post("/v1/completions", json={**COMPLETION, "model": "nope"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert (await plane.http.get("/v1/models/nope")).status_code == 404
    response = await plane.http.get("/nowhere")
    assert (response.status_code, "error" in response.json()) == (404, True)
    response = await plane.http.get("/v1/completions")
    assert (response.status_code, "error" in response.json()) == (405, True)
    assert response.headers["allow"] == "POST"
    response = await plane.http.post("/v1/completions", json={**COMPLETION, "whatever": 1})
    assert response.status_code == 200


async def test_body_too_large(plane):
    response = await plane.http.post("/v1/completions", content=b" " * 100_001)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"


async def test_chat_without_template_names_the_remedy():
    bare = bundled_tokenizer()
    async with open_plane(tokenizer=Tokenizer(bare._backend)) as plane:
        response = await plane.http.post("/v1/chat/completions", json=CHAT)
        assert response.status_code == 400
        assert "chat template" in response.json()["error"]["message"]
