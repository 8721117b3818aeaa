"""The HTTP surface on the plane without Ray."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
import tokenizers
from ray.serve.exceptions import BackPressureError

from engine.errors import EngineDead
from engine.tokenizer import Tokenizer
from tests.deployments.fake_core import expected_tokens
from tests.deployments.plane import MAX_MODEL_LEN, bundled_tokenizer, open_plane

PROMPT = "one two three four"


@pytest.fixture
async def plane():
    async with open_plane() as opened:
        yield opened


def echo(prompt: str, count: int) -> str:
    tokenizer = bundled_tokenizer()
    return tokenizer.decode(expected_tokens(tokenizer.encode(prompt), count))


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


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


@pytest.mark.parametrize("field", ["logprobs", "prompt_logprobs"])
async def test_simple_endpoints_refuse_logprobs(plane, field):
    for path in ("/generate", "/generate_stream", "/batch_generate"):
        body = {"prompt": PROMPT, "prompts": [PROMPT], field: 1}
        response = await plane.http.post(path, json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, field)


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


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/batch_generate"])
async def test_simple_endpoints_refuse_outputs_without_room(plane, path):
    body = {"prompts" if "batch" in path else "prompt": PROMPT, "max_tokens": MAX_MODEL_LEN}
    body = {name: [value] if name == "prompts" else value for name, value in body.items()}
    answer = await plane.http.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "max_tokens")
    assert plane.client.num_running == 0


async def test_models_and_health(plane):
    listed = (await plane.http.get("/v1/models")).json()
    assert [m["id"] for m in listed["data"]] == ["m"]
    assert (await plane.http.get("/v1/models/m")).json()["max_model_len"] == MAX_MODEL_LEN
    health = await plane.http.get("/health")
    assert health.status_code == 200
    assert health.json()["status"] == "ok"
    assert health.json()["engines"][0]["free_blocks"] == 4096


COMPLETION = {"model": "m", "prompt": "hi", "max_tokens": 2}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


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


@pytest.mark.parametrize("more", [{}, {"max_tokens": 6}, {"max_tokens": None}])
async def test_an_output_may_fill_what_the_prompt_leaves(plane, more):
    body = {"model": "m", "prompt": [5] * (MAX_MODEL_LEN - 6), **more}
    answer = await plane.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text


async def test_no_alternatives_need_no_logprobs(plane):
    """Clients send the defaults of both."""
    body = {**CHAT, "logprobs": False, "top_logprobs": 0}
    assert (await plane.http.post("/v1/chat/completions", json=body)).status_code == 200


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


async def test_full_server_answers_429_with_retry_after(plane):
    plane.model.max_concurrent_requests = 3
    plane.client.num_running = 2
    response = await plane.http.post("/v1/completions", json={**COMPLETION, "n": 2})
    plane.client.num_running = 0
    assert response.status_code == 429
    assert response.headers["retry-after"] == "3"


async def test_no_engine_answers_503(plane):
    plane.table.set_members("Engine-m", [])
    response = await plane.http.post("/v1/completions", json=COMPLETION)
    assert response.status_code == 503
    assert "retry-after" in response.headers
    ready = await plane.http.get("/ready")
    assert (ready.status_code, ready.headers["retry-after"]) == (503, "3")
    assert "No engine of 'm'" in ready.json()["error"]["message"]
    health = await plane.http.get("/health")  # of the process: to end it would help nobody
    assert (health.status_code, health.json()["status"]) == (200, "unready")
    assert health.json()["without_engine"] == ["m"]


async def test_ready_is_what_can_be_served_now(plane, monkeypatch):
    assert (await plane.http.get("/ready")).json() == {"status": "ready"}
    assert (await plane.http.get("/health")).json()["engines"][0]["serving"] is True
    monkeypatch.setattr("deployments.ingress.served.SILENT_S", -1.0)  # no report is fresh
    assert (await plane.http.get("/ready")).status_code == 503
    health = (await plane.http.get("/health")).json()
    assert (health["status"], health["engines"][0]["serving"]) == ("unready", False)
    monkeypatch.undo()
    (view,) = plane.table.view("Engine-m")
    assert plane.model.is_served_by(view)
    view.load.overdue = True  # a step hangs
    assert not plane.model.is_served_by(view)
    plane.links["e0"].broken.set()  # and again, whenever it is read anew
    await plane.until(lambda: not plane.hub.connected("Engine-m"))
    assert (await plane.http.get("/ready")).status_code == 503
    plane.model.may_scale_to_zero = True
    assert (await plane.http.get("/ready")).status_code == 200


async def test_errors_of_the_serve_call(plane):
    plane.handle.failure = BackPressureError(num_queued_requests=1, max_queued_requests=1)
    response = await plane.http.post("/v1/completions", json=COMPLETION)
    assert (response.status_code, "retry-after" in response.headers) == (503, True)
    plane.handle.failure = EngineDead("secret detail")
    response = await plane.http.post("/v1/completions", json=COMPLETION)
    assert response.status_code == 503 and "secret" not in response.text
    assert response.json()["error"]["code"] == "engine_lost" and "retry-after" in response.headers
    plane.handle.failure = KeyError("/secret/path")
    response = await plane.http.post("/v1/completions", json=COMPLETION)
    assert response.status_code == 500 and "secret" not in response.text
    plane.handle.failure = None
    assert (await plane.http.post("/v1/completions", json=COMPLETION)).status_code == 200
    assert plane.client.num_running == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_refusal_by_the_engine_is_a_400_with_its_reason(plane, stream):
    plane.model.max_model_len = 100_000  # more than the engine says
    body = {**COMPLETION, "prompt": "one " * 5000, "stream": stream}
    response = await plane.http.post("/v1/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["message"] == "The prompt is too long."
    assert plane.client.num_running == 0


async def test_engine_death_mid_stream_is_an_error_event():
    async with open_plane(step_s=0.001, die_at_token=5) as plane:
        body = {**COMPLETION, "max_tokens": 50, "stream": True}
        parts = events((await plane.http.post("/v1/completions", json=body)).text)
        assert "error" in parts[-1] and "choices" in parts[0]
        answer = await plane.http.post("/v1/completions", json={**body, "stream": False})
        assert answer.status_code == 503


async def test_streams_are_not_mixed_up(plane):
    prompts = [f"request number {i} has its own words" for i in range(24)]

    async def one(prompt: str) -> str:
        body = {"model": "m", "prompt": prompt, "max_tokens": 20, "stream": True}
        parts = events((await plane.http.post("/v1/completions", json=body)).text)
        return "".join(c["choices"][0]["text"] for c in parts)

    texts = await asyncio.gather(*map(one, prompts))
    assert texts == [echo(prompt, 20) for prompt in prompts]
