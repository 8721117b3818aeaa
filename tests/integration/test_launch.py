"""End to end: the launcher, `serve run`, the real engine with the bundled model, real clients."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel, Field

from tests.integration.launched import MODEL, Launched, descendants, is_alive
from tests.integration.server import ROOT

pytestmark = pytest.mark.integration
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    server = Launched(tmp_path_factory.mktemp("launch"))
    try:
        server.wait_until_ready()
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()


@pytest.fixture
def client(launched):
    return openai.OpenAI(base_url=f"{launched.url}/v1", api_key="none", max_retries=0)


def test_says_what_the_start_cost_and_how_to_try(launched):
    log = launched.log.read_text()
    assert re.search(r"engine ready in .* s \(import .*weights .*KV cache .*warm-up", log)
    assert "curl -N" in log


def test_openai_client_streams_a_chat(client):
    stream = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert "Paris" in text
    assert chunks[-1].usage.completion_tokens > 3
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    assert whole.choices[0].message.content == text


def test_openai_client_completes_with_logprobs(client):
    answer = client.completions.create(
        model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=4, logprobs=2
    )
    choice = answer.choices[0]
    assert "Paris" in choice.text
    assert len(choice.logprobs.token_logprobs) == 4
    assert max(choice.logprobs.token_logprobs) <= 0


@pytest.mark.parametrize("named", [False, True])
def test_openai_client_gets_the_call_that_it_asks_for(client, named):
    parameters = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer"}},
        "required": ["city", "days"],
        "additionalProperties": False,
    }
    tools = [
        {"type": "function", "function": {"name": "forecast", "parameters": parameters}},
        {"type": "function", "function": {"name": "now"}},
    ]
    choice = {"type": "function", "function": {"name": "forecast"}} if named else "required"
    request = {"model": MODEL, "messages": QUESTION, "tools": tools, "tool_choice": choice}
    request |= {"temperature": 0, "parallel_tool_calls": False, "max_tokens": 100}
    whole = client.chat.completions.create(**request).choices[0]
    assert whole.finish_reason == ("stop" if named else "tool_calls")
    (call,) = whole.message.tool_calls
    assert call.function.name == "forecast" or not named
    made = json.loads(call.function.arguments)
    if call.function.name == "forecast":
        assert set(made) == {"city", "days"} and made["city"] in ("Paris", "Rome")
    with client.chat.completions.stream(**request) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion().choices[0].message.tool_calls
    assert [(c.function.name, c.function.arguments) for c in streamed] == [
        (call.function.name, call.function.arguments)
    ]


def test_openai_client_sees_errors_as_its_own(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="none", messages=QUESTION)


class Person(BaseModel):
    """What an answer is to look like; every part of it is bounded, so that it ends."""

    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=150)
    moods: list[Literal["calm", "loud", "odd"]] = Field(max_length=3)


INVENT = [{"role": "user", "content": "Invent a person."}]


def parsed(client: openai.OpenAI, seed: int) -> Person:
    """An answer in the form of `Person`, streamed under an odd seed."""
    options: dict[str, Any] = {
        "model": MODEL,
        "messages": INVENT,
        "response_format": Person,
        "temperature": 1.0,
        "seed": seed,
    }
    if seed % 2:
        with client.chat.completions.stream(**options) as stream:
            answer = stream.get_final_completion()
    else:
        answer = client.chat.completions.parse(**options)
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    assert choice.message.parsed is not None
    return choice.message.parsed


def parse_among_neighbours(client: openai.OpenAI, seeds: Sequence[int]) -> list[Person]:
    """Answers in a form, at any time among 16 free ones whose text they must not change."""
    all_parsed = threading.Event()

    def ask(number: int) -> str:
        answer = client.completions.create(
            model=MODEL, prompt=f"Count on: {number}, {number + 1},", max_tokens=24, temperature=0
        )
        return answer.choices[0].text

    def keep_asking(number: int) -> set[str]:
        texts = {ask(number)}
        while not all_parsed.is_set():
            texts.add(ask(number))
        return texts

    with ThreadPoolExecutor(32) as pool:
        before = [{text} for text in pool.map(ask, range(16))]
        neighbours = pool.map(keep_asking, range(16))
        try:
            people = list(pool.map(lambda seed: parsed(client, seed), seeds))
        finally:
            all_parsed.set()
        assert list(neighbours) == before
    return people


def test_openai_client_parses_answers_of_a_form(client):
    people = parse_among_neighbours(client, range(4))
    assert len({person.model_dump_json() for person in people}) > 1


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_of_200_answers_have_their_form(client):
    assert len(parse_among_neighbours(client, range(200))) == 200


def test_every_way_to_ask_for_a_form(client):
    def ask(**form: Any) -> str:
        answer = client.completions.create(
            model=MODEL, prompt="The sky is", max_tokens=30, extra_body=form
        )
        return answer.choices[0].text

    assert ask(guided_choice=["blue", "grün"]) in ("blue", "grün")
    assert re.fullmatch(r"[0-9]{4}", ask(structured_outputs={"regex": "[0-9]{4}"}))
    assert ask(guided_grammar='root ::= "ab" | "cd"') in ("ab", "cd")


@pytest.mark.parametrize("stream", [False, True])
def test_forms_that_cannot_be_kept_are_refused_by_name(client, stream):
    for field, form in {
        "guided_regex": "(a",  # found out by the engine
        "structured_outputs": {"json": {"uniqueItems": True}},  # by the ingress
    }.items():
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(
                model=MODEL, prompt="a", stream=stream, extra_body={field: form}
            )
        assert caught.value.param == field


def test_seed_fixes_the_answer(client):
    def ask(seed: int) -> str:
        answer = client.completions.create(
            model=MODEL, prompt="Once upon a time", max_tokens=12, temperature=1.0, seed=seed
        )
        return answer.choices[0].text

    assert ask(7) == ask(7) != ask(8)


def test_64_streams_each_get_their_own_answer(client):
    prompts = [f"Count on: {i}, {i + 1}, {i + 2}," for i in range(64)]

    def ask(prompt: str, **more: Any) -> str:
        parts = client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=12, temperature=0, stream=True, **more
        )
        return "".join(part.choices[0].text for part in parts)

    with ThreadPoolExecutor(64) as pool:
        together = list(pool.map(ask, prompts))
    sample = range(0, 64, 8)
    assert [together[i] for i in sample] == [ask(prompts[i]) for i in sample]
    assert len(set(together)) > 48


def test_openai_client_embeds_beside_streams(client):
    texts = ["The capital of France is Paris.", "A cat sleeps."]

    def embed(**options: Any) -> list[list[float]]:
        answer = client.embeddings.create(model=MODEL, input=texts, **options)
        assert answer.usage.prompt_tokens == answer.usage.total_tokens > len(texts)
        return [item.embedding for item in answer.data]

    alone = embed(encoding_format="float")  # else the client asks for base64
    with ThreadPoolExecutor(16) as pool:
        streams = [pool.submit(complete_stream, client, f"{i}, {i + 1},") for i in range(8)]
        among = [future.result() for future in [pool.submit(embed) for _ in range(8)]]
        assert all(len(stream.result()) > 12 for stream in streams)
    for found in among:
        for one, other in zip(found, alone, strict=True):
            assert one == pytest.approx(other, abs=1e-4)
    assert sum(x * y for x, y in zip(*alone, strict=True)) < 0.999


def complete_stream(client: openai.OpenAI, prompt: str) -> str:
    options: dict[str, Any] = {"max_tokens": 48, "temperature": 0, "stream": True}
    parts = client.completions.create(model=MODEL, prompt=prompt, **options)
    return "".join(part.choices[0].text for part in parts)


@pytest.mark.parametrize("stream", [True, False])
async def test_disconnect_frees_blocks_soon(launched, stream):
    body = {"model": MODEL, "prompt": "Tell me a long story.", "max_tokens": 3000}
    body |= {"stream": stream, "ignore_eos": True}
    async with httpx.AsyncClient(timeout=60) as client:
        request = asyncio.ensure_future(client.post(f"{launched.url}/v1/completions", json=body))
        assert await asyncio.to_thread(wait_for_engine, launched, lambda e: e["running"] == 1, 30)
        request.cancel()
    freed = await asyncio.to_thread(
        wait_for_engine,
        launched,
        lambda e: e["running"] == 0 and e["free_blocks"] == e["total_blocks"],
        10,
    )
    assert freed, "an idle machine frees the blocks within a second"


def wait_for_engine(launched: Launched, condition: Any, timeout_s: float) -> bool:
    """Poll /health until the one engine meets the condition."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        (engine,) = httpx.get(f"{launched.url}/health").json()["engines"]
        if condition(engine):
            return True
        time.sleep(0.02)
    return False


def trunkline(*words: str, text: str = "", status: int = 0) -> str:
    """What a command of the command line writes to a pipe."""
    command = [sys.executable, "-m", "deployments.cli", *words]
    done = subprocess.run(
        command, cwd=ROOT, input=text, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == status, done.stderr
    return done.stdout


def test_command_line_completes_and_chats(launched, client):
    options = ["--url", launched.url, "--temperature", "0", "--max-tokens", "12"]
    answer = client.completions.create(
        model=MODEL, prompt="Two, four,", temperature=0, max_tokens=12
    )
    assert trunkline("complete", "Two, four,", *options) == answer.choices[0].text + "\n"
    said = trunkline("chat", *options, text="What is the capital of France?\n/exit\n")
    assert "Paris" in said and ">" not in said


def test_command_line_answers_a_batch(launched, tmp_path):
    requests, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        {"custom_id": "chat", "url": "/v1/chat/completions", "body": {"messages": QUESTION}},
        {
            "custom_id": "text",
            "url": "/v1/completions",
            "body": {"prompt": "The capital of France is"},
        },
        {"custom_id": "vector", "url": "/v1/embeddings", "body": {"input": "Paris"}},
    ]
    for line in lines:
        line["body"] |= {"model": MODEL, "temperature": 0, "max_tokens": 12}
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines) + "no request\n")
    said = trunkline("batch", str(requests), str(out), "--url", launched.url, status=1)
    assert "3 answered, 0 refused, 1 bad lines" in said
    found = {r["custom_id"]: r for r in map(json.loads, out.read_text().splitlines())}
    for custom_id in ("chat", "text"):
        response = found[custom_id]["response"]
        assert response["status_code"] == 200 and "Paris" in json.dumps(response["body"])
    assert len(found["vector"]["response"]["body"]["data"][0]["embedding"]) == 576
    assert found[None]["error"]["line"] == 4
    before = out.read_bytes()
    trunkline("batch", str(requests), str(out), "--url", launched.url, status=1)
    assert out.read_bytes() == before


def test_port_taken_is_said_clearly(launched):
    second = subprocess.run(
        [sys.executable, "-m", "deployments.launch", str(launched.config)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert second.returncode == 1
    assert "cannot listen on 127.0.0.1" in second.stderr and "http_options.port" in second.stderr


def test_lets_streams_end_and_leaves_nothing(launched, client):
    """The last test of this module: it ends the server."""
    mine = descendants(launched.process.pid)
    assert mine
    stream = client.completions.create(
        model=MODEL,
        prompt="Once",
        max_tokens=200,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    launched.process.send_signal(signal.SIGTERM)
    status = _first_refusal(launched)
    *_, last = stream
    assert status == 503
    assert last.usage.completion_tokens == 200
    assert launched.process.wait(120) == 0
    assert not [pid for pid in mine if is_alive(pid)]


def _first_refusal(launched: Launched) -> int:
    """Ask for the models until that is refused; what keeps the server from stopping is counted."""
    for _ in range(100):
        status = httpx.get(f"{launched.url}/v1/models").status_code
        if status != 200:
            return status
        time.sleep(0.05)
    return 200
