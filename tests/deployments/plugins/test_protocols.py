"""Protocol plug-ins: what they may decide, and what stays the server's."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import sys
from typing import Any

import pytest

from cluster.examples.ollama import OllamaGenerate
from deployments.ingress.app import build_asgi_app
from deployments.ingress.served import ServedModels
from deployments.plugins import ServingEngine
from tests.deployments.fake_core import expected_tokens
from tests.deployments.plane import OPTIONS, PROMPT, Plane, bundled_tokenizer, echo
from tests.deployments.plugins.asking import SECRET, Ask, AskBody, Named, open_with


def lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


async def test_the_worked_example():
    """Ollama's client reads lines of JSON, the last of which says `done`."""
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    ids = bundled_tokenizer().encode_chat(chat)
    expected = bundled_tokenizer().decode(expected_tokens(ids, 9))
    body = {"model": "m", "prompt": PROMPT, "system": "Be brief.", "options": {"num_predict": 9}}
    async with open_with(OllamaGenerate) as plane:
        streamed = await plane.http.post("/api/generate", json=body)
        assert streamed.headers["content-type"] == "application/x-ndjson"
        *parts, last = lines(streamed.text)
        assert "".join(part["response"] for part in parts) == expected
        assert [part["done"] for part in parts] == [False] * len(parts)
        counts = {"prompt_eval_count": len(ids), "eval_count": 9, "done_reason": "length"}
        assert last == {"model": "m", "response": "", "done": True, **counts}
        whole = await plane.http.post("/api/generate", json={**body, "stream": False})
        assert whole.json() == {**last, "response": expected}
        raw = {**body, "raw": True, "stream": False}
        assert (await plane.http.post("/api/generate", json=raw)).json()["response"] == echo(
            PROMPT, 9
        )
        wrong = await plane.http.post("/api/generate", json={**body, "options": {"top_p": 7}})
        assert wrong.status_code == 400 and list(wrong.json()) == ["error"]
        assert "top_p" in wrong.json()["error"]
        assert +plane.model.counts.ended == {"length": 3}


@pytest.mark.parametrize("awaited", [False, True])
@pytest.mark.parametrize("prompt", [PROMPT, [5, 6, 7], [{"role": "user", "content": PROMPT}]])
async def test_two_methods_make_a_protocol(prompt, awaited):
    class Small(ServingEngine[AskBody]):
        path = "/small"
        request_model = AskBody

        def create_prompt(self, request, raw_request):
            return later() if awaited else prompt

        def create_error_response(self, message, **kw):
            return message

    async def later() -> Any:
        await asyncio.sleep(0)
        return prompt

    tokenizer = bundled_tokenizer()
    ids = {str: tokenizer.encode, list: lambda p: p}[type(prompt)](prompt)
    ids = tokenizer.encode_chat(ids) if isinstance(ids[0], dict) else ids
    said = tokenizer.decode(expected_tokens(ids, 64))
    async with open_with(Small) as plane:
        answer = await plane.http.post("/small", json={})
        assert answer.json() == {"text": said, "finish_reason": "length"}
        streamed = await plane.http.post("/small", json={"stream": True})
        assert streamed.text.endswith("data: [DONE]\n\n")
        wrong = await plane.http.post("/small", json={"prompt": 5})
        assert (wrong.status_code, wrong.json()[:8]) == (400, "prompt: ")


FAILURES = [
    *("validator", "create_prompt", "sampling_params", "create_response", "json", "nothing"),
    "StopIteration",
    "exit",
]


@pytest.mark.parametrize("method", FAILURES)
async def test_a_plugin_that_fails_is_a_500_in_its_own_form(plane, method, caplog):
    answer = await plane.http.post("/ask/m", json={"raises": method})
    told = {"err_type": "server_error", "status_code": 500, "code": None, "param": None}
    assert answer.status_code == 500
    assert answer.json() == {"oops": "The server failed to handle the request.", **told}
    assert "the plug-in Ask failed with" in caplog.text and SECRET not in caplog.text
    await still_serves(plane)


async def still_serves(plane: Plane) -> None:
    assert plane.client.num_running == plane.model.num_preparing == 0
    assert (await plane.http.post("/ask/m", json={})).json() == {"said": echo(PROMPT, 4)}
    await plane.idle()


@pytest.mark.parametrize("method", ["create_chunk", "create_last_chunk"])
async def test_a_plugin_that_fails_in_a_stream_ends_it_with_its_error(plane, method):
    answer = await plane.http.post("/ask/m", json={"raises": method, "stream": True})
    assert answer.status_code == 200 and SECRET not in answer.text
    *_, last, done = [line for line in answer.text.splitlines() if line]
    assert json.loads(last.removeprefix("data: "))["oops"].startswith("The server failed")
    assert done == "data: [DONE]"
    await plane.idle()
    await still_serves(plane)


async def test_a_form_of_errors_that_fails_is_replaced(plane):
    class Mute(Ask):
        def create_error_response(self, message, **kw):
            raise KeyError(SECRET)

    async with open_with(Mute) as other:
        answer = await other.http.post("/ask/m", json={"raises": "refusal"})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, "prompt")


async def test_what_a_plugin_refuses_is_a_400(plane):
    answer = await plane.http.post("/ask/m", json={"raises": "refusal"})
    assert (answer.status_code, answer.json()["oops"]) == (400, "prompt does not please.")
    assert answer.json()["param"] == "prompt"


async def test_models_are_those_of_the_class(plane):
    answer = await plane.http.post("/ask/other", json={})
    assert (answer.status_code, answer.json()["code"]) == (404, "model_not_found")


async def test_several_models_of_a_class_have_an_instance_each(plane):
    others = {name: dataclasses.replace(plane.model, name=name) for name in ("n", "bare")}
    models = ServedModels({"m": plane.model, **others})
    plane.http._transport.app = build_asgi_app(
        models, OPTIONS, plugins={name: Named(name) for name in ("m", "n")}
    )
    for name in ("m", "n"):
        answer = await plane.http.post("/named", json={"model": name})
        assert answer.json() == {"by": name}
    answer = await plane.http.post("/named", json={"model": "bare"})
    assert (answer.status_code, "m, n." in answer.json()["oops"]) == (404, True)
    answer = await plane.http.post("/named", json={})
    assert (answer.status_code, answer.json()["param"]) == (400, "model")


async def test_limits_stay_the_servers(plane):
    plane.model.max_concurrent_requests = 0
    answer = await plane.http.post("/ask/m", json={})
    assert answer.status_code == 400  # more than this server takes
    plane.model.max_concurrent_requests, plane.model.num_preparing = 1, 1
    answer = await plane.http.post("/ask/m", json={})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
    assert answer.json()["err_type"] == "rate_limit_error"
    plane.model.num_preparing = 0
    long = await plane.http.post("/ask/m", json={"prompt": "a" * OPTIONS.max_body_bytes})
    assert (long.status_code, long.json()["error"]["code"]) == (413, "body_too_large")


async def test_keys_stay_the_servers(monkeypatch):
    monkeypatch.setenv("TRUNKLINE_API_KEYS", "sk-1")
    async with open_with(Ask) as plane:
        assert (await plane.http.post("/ask/m", json={})).status_code == 401
        allowed = {"Authorization": "Bearer sk-1"}
        assert (await plane.http.post("/ask/m", json={}, headers=allowed)).status_code == 200


async def test_engines_that_are_not_there_are_told_of_in_its_form(plane):
    plane.table.set_members("Engine-m", [])
    answer = await plane.http.post("/ask/m", json={})
    assert (answer.status_code, answer.json()["code"]) == (503, "engine_unavailable")
    assert answer.headers["retry-after"] == "3"


async def test_no_request_names_a_class(plane):
    body = {"class_name": "this:Zen", "plugin": "this:Zen", "model": "this:Zen"}
    for path in ("/ask/m", "/ask/this:Zen", "/generate", "/v1/chat/completions"):
        assert (await plane.http.post(path, json=body)).status_code in (200, 400, 404)
    assert "this" not in sys.modules


async def test_prompts_of_plugins_are_not_logged(plane, caplog):
    caplog.set_level(logging.DEBUG)
    for method in ("create_prompt", "refusal", ""):
        await plane.http.post("/ask/m", json={"prompt": "my own words", "raises": method})
    assert "my own words" not in caplog.text
