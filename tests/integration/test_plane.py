"""Engines and ingress replicas on a real Ray cluster, with and without the fast path."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.cluster.test_monitoring import all_queries, names
from tests.deployments.plane import echo
from tests.integration.flags import FLAGS
from tests.integration.server import ROOT, Server

pytestmark = pytest.mark.integration

FREED_WITHIN_S = 10.0
"""A second is what an idle machine needs; the request would run for 30."""

LOST_WITHIN_S = 6.0
"""`/ready` tells within this time that the last engine is lost.

A second is what an idle machine needs, and 2.5 s of silence tell as well; this one starts engines
meanwhile."""
BACK_WITHIN_S = 4.5
"""And so long after requests are served again, or before; Serve looks every 5 s."""

ARGS = {
    "models": {
        "m": {
            "engine": {"max_num_seqs": 64},
            "deployment": {"num_replicas": 2, "num_cpus": 0.1, "graceful_shutdown_timeout_s": 5},
            "tool_call_parser": "hermes",
            "reasoning_parser": "qwen3",
            "class_name": "OllamaGenerate",
        }
    },
    "ingress": {
        "num_replicas": 2,
        "graceful_shutdown_timeout_s": 5,
        "allow_request_chat_templates": True,
        "allowed_classes": ["cluster.examples.ollama:OllamaGenerate"],
    },
}


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Where the processes write what they log."""
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module", params=[False, True], ids=["default-flags", "fast-path"])
def server(request, logs):
    logging = {"requests": True, "format": "json", "folder": str(logs)}
    args = {**ARGS, "logging": logging}
    started = Server(fast_path=request.param, args=args, fake={"step_s": 0.01})
    try:
        wait_for(started, lambda health: len(health["engines"]) == 2 and all_connected(health))
        yield started
    finally:
        started.stop()


def health(server: Server) -> dict[str, Any]:
    try:  # HAProxy answers for an ingress that is not there
        return httpx.get(f"{server.url}/health", timeout=5).raise_for_status().json()
    except (httpx.HTTPError, json.JSONDecodeError):
        return {"status": "unreachable", "engines": []}


def all_connected(state: dict[str, Any]) -> bool:
    return state["status"] == "ok" and all(e["age_s"] is not None for e in state["engines"])


def wait_for(server: Server, condition: Any, timeout_s: float = 120) -> float:
    """Poll /health until several answers in a row (of either ingress) agree; returns seconds."""
    begin, agreed = time.monotonic(), 0
    while agreed < 4:
        agreed = agreed + 1 if condition(health(server)) else 0
        if time.monotonic() - begin > timeout_s:
            pytest.fail(f"not in {timeout_s} s: {health(server)}\n{server.log()[-4000:]}")
        time.sleep(0.03)
    return time.monotonic() - begin


def idle(state: dict[str, Any], num_engines: int = 2) -> bool:
    return len(state["engines"]) == num_engines and all(
        e["running"] == e["waiting"] == e["booked"] == 0 and e["free_blocks"] == e["total_blocks"]
        for e in state["engines"]
    )


def completion(prompt: str, max_tokens: int, **more: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": prompt, "max_tokens": max_tokens, **more}


async def read_stream(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[str, list[Any]]:
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        assert response.status_code == 200
        return await read_chunks(response)


async def read_chunks(response: httpx.Response) -> tuple[str, list[Any]]:
    text, others = "", []
    async for line in response.aiter_lines():
        if not line.startswith("data: {"):
            continue
        chunk = json.loads(line.removeprefix("data: "))
        if "choices" in chunk:
            text += chunk["choices"][0]["text"]
        else:
            others.append(chunk)
    return text, others


def connect(server: Server) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=200)
    return httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits)


async def test_a_plugin_serves_its_protocol(server):
    body = {"model": "m", "prompt": "one two three", "raw": True, "options": {"num_predict": 12}}
    async with connect(server) as client:
        answers = [await client.post("/api/generate", json=body) for _ in range(4)]
        wrong = await client.post("/api/generate", json={**body, "prompt": 5})
        unknown = await client.post("/api/generate", json={**body, "model": "other"})
    for answer in answers:  # of either ingress
        *parts, last = map(json.loads, answer.text.splitlines())
        assert "".join(part["response"] for part in parts) == echo(body["prompt"], 12)
        assert (last["done"], last["done_reason"], last["eval_count"]) == (True, "length", 12)
    assert (wrong.status_code, list(wrong.json())) == (400, ["error"])
    assert unknown.status_code == 404
    wait_for(server, idle)


async def test_concurrent_streams_are_not_mixed_up(server):
    prompts = [f"stream {i} speaks of nothing but {i * 37}" for i in range(64)]
    async with connect(server) as client:
        answers = await asyncio.gather(
            *(read_stream(client, completion(p, 20 + i % 13)) for i, p in enumerate(prompts))
        )
    assert [text for text, _ in answers] == [
        echo(prompt, 20 + i % 13) for i, prompt in enumerate(prompts)
    ]
    wait_for(server, idle)


async def test_fan_out_of_one_request(server):
    async with connect(server) as client:
        body = completion("fan out", 5, n=8)
        answer = (await client.post("/v1/completions", json=body)).json()
    assert [c["text"] for c in answer["choices"]] == [echo("fan out", 5)] * 8


@pytest.mark.parametrize("name", ["localhost", "evil.example"])
def test_no_page_reads_from_an_open_server_by_a_name_of_its_own(server, name):
    """Its name can lead to its visitor's loopback."""
    host = {"Host": f"{name}:{server.port}"}
    response = httpx.get(f"{server.url}/v1/models", headers=host)
    assert response.status_code == (200 if name == "localhost" else 403)


@pytest.mark.parametrize("stream", [True, False])
async def test_disconnect_frees_blocks_soon(server, stream):
    async with connect(server) as client:
        body = completion("a client that leaves", 3000, stream=stream)
        request = asyncio.ensure_future(client.post("/v1/completions", json=body))
        await asyncio.to_thread(
            wait_for, server, lambda h: sum(e["running"] for e in h["engines"]) == 1
        )
        request.cancel()
    await asyncio.to_thread(wait_for, server, idle, FREED_WITHIN_S)


def told(logs: Path, request_id: str) -> dict[str, dict[str, Any]]:
    """Component → the line that it wrote at the end of a request."""
    whole = [file.read_text().rpartition("\n")[0] for file in logs.iterdir()]  # lines so far
    lines = [json.loads(line) for text in whole for line in text.splitlines()]
    ended = (line for line in lines if line["logger"] == "trunkline.requests")
    return {line["component"]: line for line in ended if line["request_id"] == request_id}


async def test_an_id_travels_to_the_engine_and_back(server, logs):
    async with connect(server) as client:
        answers = {}
        mine = f"mine-{server.port}"  # the logs are those of both servers
        for sent in (mine, "m" * 129, None):
            headers = {} if sent is None else {"X-Request-ID": sent}
            body = completion("whose is this", 3)
            answers[sent] = await client.post("/v1/completions", json=body, headers=headers)
    taken = [answer.headers["x-request-id"] for answer in answers.values()]
    assert taken[0] == mine and len({*taken}) == 3 and len(taken[1]) < 129
    for request_id in (taken[0], taken[2]):
        async with asyncio.timeout(30):
            while len(lines := told(logs, request_id)) < 2:
                await asyncio.sleep(0.02)
        assert {line["output_tokens"] for line in lines.values()} == {3}
        assert lines["engine"]["instance"] in lines["ingress"]["engines"]
        assert lines["engine"]["model"] == lines["ingress"]["model"] == "m"
    assert not any("whose is this" in file.read_text() for file in logs.iterdir())


def test_deployments_and_actors_have_names_that_can_be_read(server):
    (app,) = json.loads(server.call("details"))["applications"].values()
    assert set(app["deployments"]) == {"Ingress", "Engine-m"}
    assert "(EngineActor(m) pid=" in server.log()


def exported(page: str) -> set[str]:
    """The names of the samples on a page in Prometheus' format."""
    return {re.split("[{ ]", line)[0] for line in page.splitlines() if not line.startswith("#")}


def not_told(names: set[str], page: str) -> set[str]:
    """What is not on Ray's page yet: samples, processes, or an answered request."""
    processes = {"ingress", "engine_actor"}
    processes -= {*re.findall('event_loop_lag.*process="(.*?)"', page)}
    counts = re.findall(r'http_requests_total{.*reason="",.*status="200".* ([\d.]+)$', page, re.M)
    answers = set() if sum(map(float, counts)) else {"an answer"}
    return (names - exported(page)) | processes | answers


@pytest.mark.parametrize("server", FLAGS, indirect=True)  # Ray takes its ten seconds
async def test_metrics_are_exported(server):
    """All that the dashboard and the alerts ask for, and all that `/metrics` has."""
    async with connect(server) as client:
        (await client.post("/v1/completions", json=completion("count me", 7))).raise_for_status()
        page = (await client.get("/metrics")).text
        wanted = {name for query in all_queries().values() for name in names(query)}
        wanted |= {f"ray_{name}" for name in exported(page)}
        deadline = time.monotonic() + 90  # Ray exports every ten seconds, if it comes to it
        while missing := not_told(wanted, server.call("metrics")):
            assert time.monotonic() < deadline, missing
            await asyncio.sleep(0.5)
        loads = [line for line in page.splitlines() if "num_requests_running{" in line]
        engines = {line.split('engine="')[1].split('"')[0] for line in loads}
        assert engines == {e["id"] for e in (await client.get("/health")).json()["engines"]}


def test_openai_client_sees_calls_and_thinking(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    arguments = {"a": 1, "text": "} </tool_call"}
    call = f'<tool_call>\n{{"name": "add", "arguments": {json.dumps(arguments)}}}\n</tool_call>'
    said = f"<think>hm</think>I add.\n{call}\n{call}§"
    request = {
        "model": "m",
        "messages": [{"role": "user", "content": said}],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
        "stop": "§",
        "extra_body": {"chat_template": "{{ messages[0].content }}"},  # repeated by the fake core
    }
    choice = client.chat.completions.create(**request).choices[0]
    calls = choice.message.tool_calls
    assert (choice.message.content, choice.finish_reason) == ("I add.\n", "tool_calls")
    assert choice.message.reasoning_content == "hm"
    with client.chat.completions.stream(**request) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion().choices[0]
    assert (streamed.message.content, streamed.finish_reason) == ("I add.\n", "tool_calls")
    for made in (calls, streamed.message.tool_calls):
        assert [call.function.name for call in made] == ["add", "add"]
        for call in made:
            assert json.loads(call.function.arguments) == arguments
        assert len({call.id for call in made}) == 2


@pytest.mark.parametrize("server", [True], ids=["fast-path"], indirect=True)
def test_command_line_says_where_more_would_run(server):
    """On the cluster of the server, which has taken its part of it."""
    words = ["check", "serve_config.yaml", "--address", server.call("address")]
    words += ["--set", "deployment.num_cpus=5", "--set", "deployment.num_replicas=2"]
    done = subprocess.run(
        [sys.executable, "-m", "deployments.cli", *words],
        cwd=ROOT,
        env={**os.environ, "RAY_AUTH_MODE": "token"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    name = "Engine-smollm2-135m-instruct"
    assert re.search(rf"  {name} 1: on [\d.]+\n", done.stdout)  # of 8 CPUs, most are free
    assert f"  {name} 2: waits for CPU 5.1 on one node" in done.stdout


async def test_bad_requests_leave_the_server_well(server):
    async with connect(server) as client:
        bad = [
            (b"{", 400),
            (json.dumps(completion("x", 0)).encode(), 400),
            (json.dumps({**completion("x", 1), "model": "none"}).encode(), 404),
            (json.dumps(completion("word " * 5000, 1)).encode(), 400),
        ]
        for content, status in bad:
            response = await client.post("/v1/completions", content=content)
            assert (response.status_code, "error" in response.json()) == (status, True)
        assert (await client.get("/v1/nothing")).json()["error"]["message"]
        answer = (await client.post("/v1/completions", json=completion("fine", 2))).json()
        assert answer["choices"][0]["text"] == echo("fine", 2)


async def test_killed_ingress_has_its_requests_aborted(server):
    async with connect(server) as client:
        requests = [
            asyncio.ensure_future(client.post("/v1/completions", json=completion("orphan", 3000)))
            for _ in range(8)
        ]
        await asyncio.to_thread(
            wait_for, server, lambda h: sum(e["running"] for e in h["engines"]) == 8
        )
        pids = server.call("pids", class_name="Ingress")
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL)
        answers = await asyncio.gather(*requests, return_exceptions=True)
    assert all(isinstance(a, Exception) or a.status_code >= 500 for a in answers)
    await asyncio.to_thread(wait_for, server, idle)


async def test_streams_of_a_killed_engine_go_on_elsewhere(server):
    async with connect(server) as client:
        streams = [
            asyncio.ensure_future(read_stream(client, completion("tenacious", 1200)))
            for _ in range(8)
        ]
        await asyncio.to_thread(
            wait_for, server, lambda h: sum(e["running"] for e in h["engines"]) == 8
        )
        engines = (await asyncio.to_thread(health, server))["engines"]
        name, pid = next(iter(server.call("engine_pids").items()))
        (lost,) = (e["running"] for e in engines if name.endswith(e["id"]))
        assert 0 < lost < 8
        os.kill(pid, signal.SIGKILL)
        answers = await asyncio.gather(*streams)
    assert answers == [(echo("tenacious", 1200), [])] * 8
    await asyncio.to_thread(wait_for, server, idle)
    assert name not in server.call("engine_pids")


async def test_ready_soon_tells_the_truth(server):
    """Beside the last test: here no engine is left for a while."""
    async with connect(server) as client:
        for pid in server.call("engine_pids").values():
            os.kill(pid, signal.SIGKILL)
        lost = await seconds_until(lambda: answers(client, "GET", "/ready", 503))
        refused = await client.get("/ready")
        assert refused.headers["retry-after"] and "error" in refused.json()
        assert (await client.get("/health")).status_code == 200
        served, ready = await asyncio.gather(
            seconds_until(lambda: answers(client, "POST", "/v1/completions", 200)),
            seconds_until(lambda: answers(client, "GET", "/ready", 200)),
        )
    print(f"lost after {lost:.2f} s, served after {served:.2f} s, ready after {ready:.2f} s")
    assert lost < LOST_WITHIN_S
    assert abs(served - ready) < BACK_WITHIN_S


async def answers(client: httpx.AsyncClient, method: str, path: str, status: int) -> bool:
    """Whether a few requests, which the ingress replicas share, all get this status."""
    body = completion("are you there", 1) if method == "POST" else None
    got = await asyncio.gather(*(client.request(method, path, json=body) for _ in range(6)))
    return all(response.status_code == status for response in got)


async def seconds_until(condition: Any) -> float:
    begin = time.monotonic()
    async with asyncio.timeout(60):
        while not await condition():
            await asyncio.sleep(0.02)
    return time.monotonic() - begin
