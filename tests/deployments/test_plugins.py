"""Protocol plug-ins: what they may decide, what stays the server's, and which are loaded at all."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from pydantic import ValidationError, field_validator

from cluster.examples.ollama import OllamaGenerate
from deployments.app import build
from deployments.config import AppArgs
from deployments.ingress import plugged, plugin_threads
from deployments.ingress.app import build_asgi_app, check_plugin_paths
from deployments.ingress.options import IngressOptions
from deployments.ingress.plugin_threads import PluginThreads
from deployments.ingress.served import ServedModels
from deployments.plugins import Body, InvalidRequest, SamplingParams, ServingEngine
from deployments.plugins.loading import load_classes
from engine.errors import ConfigError
from tests.deployments.fake_core import expected_tokens
from tests.deployments.plane import OPTIONS, Plane, bundled_tokenizer, open_plane
from tests.deployments.test_routes import PROMPT, echo

HERE = "tests.deployments.test_plugins"
SECRET = "zyzzyva"


class AskBody(Body):
    prompt: str = PROMPT
    model: str | None = None
    stream: bool = False
    raises: str = ""
    """Method that fails."""

    @field_validator("raises")
    @classmethod
    def _fails(cls, value: str) -> str:
        return value if value != "validator" else {}[SECRET]


class Ask(ServingEngine[AskBody]):
    """Fails where it is told to."""

    path = "/ask/{model}"
    request_model = AskBody

    def create_prompt(self, request, raw_request):
        self._fail(request, "create_prompt")
        if request.raises == "refusal":
            raise InvalidRequest("prompt does not please.", "prompt")
        if request.raises == "StopIteration":
            next(iter(()))
        if request.raises == "exit":
            sys.exit(1)
        return None if request.raises == "nothing" else request.prompt

    def sampling_params(self, request):
        self._fail(request, "sampling_params")
        return SamplingParams(max_tokens=4)

    def create_response(self, request, output):
        self._fail(request, "create_response")
        return object() if request.raises == "json" else {"said": output.text}

    def create_chunk(self, request, index, delta):
        self._fail(request, "create_chunk")
        return {"said": delta.text} if delta.text else None

    def create_last_chunk(self, request, output):
        self._fail(request, "create_last_chunk")
        return {"all": output.text, "by": self.model_name}

    def create_error_response(self, message, **kw):
        if message == "Fail.":
            raise KeyError(SECRET)
        return {"oops": message, **kw}

    def _fail(self, request, method: str) -> None:
        if request.raises == method:
            raise KeyError(SECRET)


class Named(Ask):
    """Tells which instance answers."""

    path = "/named"

    def create_response(self, request, output):
        return {"by": self.model_name}


@asynccontextmanager
async def open_with(
    *plugins: type[ServingEngine[Any]], options: IngressOptions = OPTIONS, **fake: Any
) -> AsyncIterator[Plane]:
    async with open_plane(options=options, **fake) as plane:
        for plugin in plugins:
            models, by_name = ServedModels({"m": plane.model}), {"m": plugin("m")}
            plane.app = build_asgi_app(models, options, plugins=by_name)
            plane.http._transport.app = plane.app
        yield plane


@pytest.fixture
async def plane():
    async with open_with(Ask) as opened:
        yield opened


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


async def test_a_slow_plugin_holds_up_nobody_else():
    """Not even when all of its threads wait."""
    go_on = threading.Event()

    class Slow(Ask):
        def create_prompt(self, request, raw_request):
            go_on.wait()
            return request.prompt

    async with open_with(Slow) as plane:
        slow = [asyncio.create_task(plane.http.post("/ask/m", json={})) for _ in range(9)]
        body = {"prompt": f"{PROMPT} " * 20, "max_tokens": 3}
        try:
            for _ in range(3):
                answer = await plane.http.post("/generate", json=body)
                assert answer.status_code == 200
            assert not any(task.done() for task in slow)
        finally:
            go_on.set()  # else a failure would hang until the threads end
        for answer in await asyncio.gather(*slow):
            assert answer.json() == {"said": echo(PROMPT, 4)}


async def test_plugins_that_hang_keep_no_thread_from_the_others(monkeypatch, caplog):
    monkeypatch.setattr(plugin_threads, "TIME_LIMIT_S", 0.2)
    monkeypatch.setattr(plugin_threads, "MAX_LEFT_BEHIND", 5)
    go_on = threading.Event()

    class Hanging(Ask):
        def create_prompt(self, request, raw_request):
            if request.raises == "hang":
                go_on.wait()
            return request.prompt

    async with open_with(Hanging) as plane:

        async def ask(raises=""):
            return await plane.http.post("/ask/m", json={"raises": raises})

        try:
            for answer in await asyncio.gather(*(ask("hang") for _ in range(4))):
                assert answer.status_code == 504
                assert "takes too long" in answer.text
            assert "the plug-in Hanging has not ended" in caplog.text
            with monkeypatch.context() as patient:  # a busy machine may take long, too
                patient.setattr(plugin_threads, "TIME_LIMIT_S", 60)
                assert (await ask()).json() == {"said": echo(PROMPT, 4)}
            assert (await ask("hang")).status_code == 504
            assert (await ask()).status_code == 504  # as many are left behind as may be
        finally:
            go_on.set()
        async with asyncio.timeout(10):
            while (await ask()).status_code != 200:
                await asyncio.sleep(0.01)
        assert plane.model.num_preparing == 0


async def test_threads_that_begin_one_after_another_are_not_left_behind_without_end(monkeypatch):
    monkeypatch.setattr(plugin_threads, "TIME_LIMIT_S", 0.05)
    monkeypatch.setattr(plugin_threads, "MAX_LEFT_BEHIND", 1)
    threads, go_on = PluginThreads(), threading.Event()
    try:
        begun = [
            asyncio.create_task(threads.run(go_on.wait)) for _ in range(plugin_threads.THREADS)
        ]
        await asyncio.wait(begun)  # more than may be left behind, as they were under way together
        with pytest.raises(TimeoutError):
            await threads.run(lambda: pytest.fail("no thread should begin"))
    finally:
        go_on.set()
    await asyncio.gather(*begun, return_exceptions=True)


async def test_prompts_that_are_awaited_in_vain_end_too(monkeypatch):
    monkeypatch.setattr(plugged, "TIME_LIMIT_S", 0.05)

    class Endless(Ask):
        async def create_prompt(self, request, raw_request):
            await asyncio.Event().wait()

    async with open_with(Endless) as plane:
        assert (await plane.http.post("/ask/m", json={})).status_code == 500


async def test_a_client_that_leaves_meanwhile_holds_no_place():
    class Endless(Ask):
        async def create_prompt(self, request, raw_request):
            await asyncio.Event().wait()

    async with open_with(Endless) as plane:
        asking = asyncio.create_task(plane.http.post("/ask/m", json={}))
        await plane.until(lambda: plane.model.num_preparing == 1)
        asking.cancel()
        await plane.until(lambda: plane.model.num_preparing == 0)


async def test_engines_that_are_not_there_are_told_of_in_its_form(plane):
    plane.table.set_members("Engine-m", [])
    answer = await plane.http.post("/ask/m", json={})
    assert (answer.status_code, answer.json()["code"]) == (503, "engine_unavailable")
    assert answer.headers["retry-after"] == "3"


def arguments(class_name: str, *allowed: str) -> dict[str, Any]:
    return {
        "models": {"m": {"class_name": class_name}},
        "ingress": {"allowed_classes": list(allowed)},
    }


def test_nothing_is_imported_that_is_not_allowed():
    """`this` prints when it is imported, and nobody else imports it."""
    for name in ("this", "Zen", "this:Zen", "../this", "os.system", ""):
        with pytest.raises(ConfigError, match="allow-list"):
            AppArgs(**arguments(name, f"{HERE}:Ask")).check()
    assert "this" not in sys.modules
    with pytest.raises(ConfigError, match="allow-list"):
        load_classes({"m": "Ask"}, [])


def test_what_is_allowed_but_not_named_is_not_imported():
    args = AppArgs(**arguments("Ask", "this:Zen", f"{HERE}:Ask"))
    (found,) = args.plugin_classes().values()
    assert found.__name__ == "Ask" and "this" not in sys.modules


async def test_no_request_names_a_class(plane):
    body = {"class_name": "this:Zen", "plugin": "this:Zen", "model": "this:Zen"}
    for path in ("/ask/m", "/ask/this:Zen", "/generate", "/v1/chat/completions"):
        assert (await plane.http.post(path, json=body)).status_code in (200, 400, 404)
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    ("allowed", "words"),
    [
        (["cluster.examples.ollama"], "package.module:Class"),
        (["../x:Y"], "package.module:Class"),
        ([""], "package.module:Class"),
        (["a:Ask", "b:Ask"], "same class name"),
    ],
)
def test_wrong_allow_lists(allowed, words):
    with pytest.raises(ValidationError, match=words):
        IngressOptions(allowed_classes=allowed)


class NoPath(Ask):
    path = "ask"


class NoBody(Ask):
    request_model = dict  # type: ignore[assignment]


class NoPrompt(ServingEngine[AskBody]):
    path = "/x"
    request_model = AskBody


class Wide(Ask):
    path = "/{anything}"


class Taken(Ask):
    path = "/v1/completions"


class Broken(Ask):
    path = "/a/{b:nothing}"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere.at_all:Ask", "cannot import nowhere.at_all:Ask .*No module named"),
        (f"{HERE}:Absent", "no subclass"),
        (f"{HERE}:AskBody", "no subclass"),
        (f"{HERE}:NoPath", "begins with /"),
        (f"{HERE}:NoBody", "request_model"),
        (f"{HERE}:NoPrompt", "must override create_prompt"),
        (f"{HERE}:Wide", r"wants the path /\{anything\}, but .* is that of the server"),
        (f"{HERE}:Taken", "/v1/completions is that of the server"),
        (f"{HERE}:Broken", "Unknown path convertor"),
    ],
)
def test_classes_that_cannot_serve_fail_at_build(path, words):
    with pytest.raises(ConfigError, match=words):
        build(AppArgs(**arguments(path.partition(":")[2], path)))


def test_plugins_answer_for_one_another_no_more_than_for_the_server():
    class Same(Ask):
        pass

    check_plugin_paths([Ask, Ask])
    check_plugin_paths([Ask, Named])

    class One(Ask):
        path = "/ask/one"

    with pytest.raises(ConfigError, match="that of Ask"):
        check_plugin_paths([Ask, Same])
    for order in ([Ask, One], [One, Ask]):  # whichever came second would never be asked
        with pytest.raises(ConfigError, match="wants the path /ask/"):
            check_plugin_paths(order)


async def test_prompts_of_plugins_are_not_logged(plane, caplog):
    caplog.set_level(logging.DEBUG)
    for method in ("create_prompt", "refusal", ""):
        await plane.http.post("/ask/m", json={"prompt": "my own words", "raises": method})
    assert "my own words" not in caplog.text
