"""Endpoints beside OpenAI's, and its paths without prefix, on the plane without Ray."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from deployments.ingress.message_style import MessageStyle
from deployments.ingress.options import IngressOptions
from deployments.samples import Histogram
from engine.tokenizer import Tokenizer
from tests.deployments.fake_core import expected_tokens
from tests.deployments.plane import (
    MAX_MODEL_LEN,
    PROMPT,
    bundled_tokenizer,
    echo,
    events,
    open_plane,
)

CHAT = [{"role": "user", "content": "hi"}]


async def post(plane: Any, path: str, **body: Any) -> dict[str, Any]:
    response = await plane.http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def test_tokenize_a_prompt(plane):
    ids = bundled_tokenizer().encode(PROMPT)
    answer = await post(plane, "/tokenize", model="m", prompt=PROMPT)
    assert answer == {
        **{"count": 4, "max_model_len": MAX_MODEL_LEN, "tokens": ids, "token_strs": None}
    }
    answer = await post(plane, "/tokenize", prompt=PROMPT, return_token_strs=True)
    assert answer["token_strs"] == ["one", "Ġtwo", "Ġthree", "Ġfour"]
    assert (await post(plane, "/tokenize", prompt=""))["tokens"] == []


async def test_tokenize_tells_what_a_chat_is_charged(plane):
    answer = await post(plane, "/tokenize", messages=CHAT)
    assert answer["tokens"] == bundled_tokenizer().encode_chat(CHAT)
    chat = await post(plane, "/v1/chat/completions", model="m", messages=CHAT, max_tokens=1)
    assert answer["count"] == chat["usage"]["prompt_tokens"]
    answer = await post(plane, "/tokenize", messages=CHAT, add_generation_prompt=False)
    assert answer["tokens"] == bundled_tokenizer().encode_chat(CHAT, add_generation_prompt=False)


async def test_tokenize_tells_what_tools_cost():
    tool = {"type": "function", "function": {"name": "add"}}
    tokenizer = Tokenizer(bundled_tokenizer()._backend, chat_template="{{ tools | tojson }}")
    async with open_plane(tokenizer=tokenizer) as plane:
        answer = await post(plane, "/tokenize", messages=CHAT, tools=[tool])
    assert tokenizer.decode(answer["tokens"]).startswith('[{"type": "function"')


async def test_detokenize_is_the_way_back(plane):
    text = "<|im_start|>Grüße 🌍"
    ids = (await post(plane, "/tokenize", prompt=text))["tokens"]
    assert await post(plane, "/detokenize", model="m", tokens=ids) == {"prompt": text}
    assert await post(plane, "/detokenize", tokens=[]) == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": CHAT}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "long " * 50 * MAX_MODEL_LEN}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": ["a"]}, "messages"),
        ("/tokenize", {"messages": CHAT, "tools": [1]}, "tools"),
        ("/tokenize", {"messages": CHAT, "chat_template": "{{ 1 }}"}, "chat_template"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [49152]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
        ("/generate", {"prompt": "a", "history_input": ["b"]}, "history_output"),
        ("/generate", {"prompt": "a", "history_input": "b"}, "history_input"),
        ("/generate", {"prompt": "a", "system_info": 1}, "system_info"),
        ("/generate", {"prompt": "a", "stream": "yes"}, "stream"),
        ("/batch_generate", {"prompts": ["a"], "stream": True}, "stream"),
    ],
)
async def test_bad_fields_are_named(plane, path, body, param):
    response = await plane.http.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_version_and_ping(plane):
    assert (await plane.http.get("/version")).json()["version"][0].isdigit()
    for method in ("GET", "POST"):
        assert (await plane.http.request(method, "/ping")).status_code == 200
    plane.table.set_members("Engine-m", [])
    assert (await plane.http.get("/ping")).status_code == 503


async def test_paths_without_prefix(plane):
    answer = await post(plane, "/completions", model="m", prompt=PROMPT, max_tokens=3)
    assert answer["choices"][0]["text"] == echo(PROMPT, 3)
    answer = await post(plane, "/chat/completions", model="m", messages=CHAT, max_tokens=3)
    assert answer["object"] == "chat.completion"


async def test_generate_with_a_history(plane):
    chat = [
        {"role": "system", "content": "Be brief."},
        *[{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}],
        {"role": "user", "content": "three"},
    ]
    prompt = bundled_tokenizer().encode_chat(chat)
    expected = bundled_tokenizer().decode(expected_tokens(prompt, 20))
    body = {"prompt": "three", "system_info": "Be brief.", "max_tokens": 20}
    body |= {"history_input": ["one"], "history_output": ["two"]}
    answer = await post(plane, "/generate", **body)
    assert (answer["text"], answer["prompt"]) == (expected, "three")
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    for path, more in (("/generate_stream", {}), ("/generate", {"stream": True})):
        parts = events((await plane.http.post(path, json={**body, **more})).text)
        assert "".join(part["text"] for part in parts) == expected
        assert parts[-1]["usage"]["prompt_tokens"] == len(prompt)
    assert "text" in (await post(plane, "/generate", **body, stream=False))


async def test_generate_with_an_empty_history_goes_on_with_the_prompt(plane):
    empty = {"system_info": "", "history_input": [], "history_output": []}
    answer = await post(plane, "/generate", prompt=PROMPT, max_tokens=4, **empty)
    assert answer["text"] == echo(PROMPT, 4)
    async with open_plane(tokenizer=Tokenizer(bundled_tokenizer()._backend)) as bare:
        response = await bare.http.post("/generate", json={"prompt": "a", "system_info": "b"})
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "prompt")
        assert "chat template" in error["message"]


@pytest.mark.parametrize("parser", [None, "qwen3"])
async def test_chats_are_answered_in_the_role_of_the_model(plane, parser):
    plane.model.style = MessageStyle.of(plane.model.tokenizer, None, parser, role="bot")
    body = {"model": "m", "messages": CHAT, "max_tokens": 3}
    answer = await post(plane, "/v1/chat/completions", **body)
    assert answer["choices"][0]["message"]["role"] == "bot"
    streamed = await plane.http.post("/v1/chat/completions", json={**body, "stream": True})
    roles = [chunk["choices"][0]["delta"].get("role") for chunk in events(streamed.text)]
    assert roles[0] == "bot" and set(roles[1:]) == {None}


def samples(text: str) -> dict[str, float]:
    """Name and labels, those that name a process left out → value, as Prometheus' own client
    reads them."""
    return {
        sample.name
        + "".join(f" {k}={v}" for k, v in sorted(sample.labels.items()) if k != "ingress"): value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        for value in [sample.value]
    }


async def test_metrics(plane):
    plane.model.name = 'a "model"\\'
    await post(plane, "/v1/completions", model="m", prompt=PROMPT, max_tokens=3, n=2)
    await post(plane, "/v1/completions", model="m", prompt=PROMPT, max_tokens=99, stop=" two")
    await plane.idle()
    response = await plane.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {k.replace(' model_name=a "model"\\', ""): v for k, v in samples(response.text).items()}
    assert found["trunkline_num_requests_running engine=e0"] == 0
    assert found["trunkline_kv_cache_free_blocks engine=e0"] == 4096
    assert found["trunkline_prompt_tokens_total engine=e0"] == 12  # of each completion
    assert found["trunkline_generation_tokens_total engine=e0"] >= 8  # the engine runs ahead
    assert found["trunkline_num_engines"] == 1
    assert found["trunkline_request_success_total finished_reason=length"] == 2
    assert found["trunkline_request_success_total finished_reason=stop"] == 1
    assert found["trunkline_request_prompt_tokens_sum"] == 8
    assert found["trunkline_request_generation_tokens_sum"] == 8
    assert found["trunkline_e2e_request_latency_seconds_bucket le=+Inf"] == 2


async def test_metrics_tell_where_time_goes(one_by_one):
    async with open_plane(step_s=0.01) as plane:
        await post(plane, "/v1/completions", model="m", prompt=PROMPT, max_tokens=5)
        text = (await plane.http.get("/metrics")).text
    found = {k.removesuffix(" model_name=m"): v for k, v in samples(text).items()}
    sums = {
        name: found[f"trunkline_{name}_seconds_sum"]
        for name in ("time_to_first_token", "e2e_request_latency", "inter_token_latency")
    }
    queue, prefill, decode = (
        found[f"trunkline_request_{stage}_time_seconds_sum"]
        for stage in ("queue", "prefill", "decode")
    )
    assert queue + prefill == pytest.approx(sums["time_to_first_token"])
    assert queue + prefill + decode == pytest.approx(sums["e2e_request_latency"])
    assert decode == pytest.approx(sums["inter_token_latency"], abs=0.02)
    assert found["trunkline_request_time_per_output_token_seconds_sum"] == pytest.approx(decode / 4)
    assert found["trunkline_inter_token_latency_seconds_count"] == 4


async def test_tokens_of_several_completions_are_no_gaps(plane):
    await post(plane, "/v1/completions", model="m", prompt=PROMPT, max_tokens=9, n=2)
    assert sum(plane.model.counts.gap_s.counts) == 0
    assert sum(plane.model.counts.token_s.counts) == 1


async def test_metrics_tell_how_requests_end():
    async with open_plane(step_s=0.001, die_at_token=5) as plane:
        body = {"model": "m", "prompt": PROMPT, "max_tokens": 50}
        assert (await plane.http.post("/v1/completions", json=body)).status_code == 503
        counts = plane.model.counts
        assert counts.ended == {"stop": 0, "length": 0, "abort": 0, "error": 1}
        assert counts.latency_s.total == 0
        assert counts.num_failovers == 1  # its only engine has died; it waited for another


async def test_what_an_engine_refuses_is_not_lost():
    """An alert is about completions that are."""
    async with open_plane(max_model_len=4) as plane:
        body = {"model": "m", "prompt": PROMPT * 9, "max_tokens": 1}
        assert (await plane.http.post("/v1/completions", json=body)).status_code == 400
        assert plane.model.counts.ended == {"stop": 0, "length": 0, "abort": 1, "error": 0}


async def test_answers_are_counted_by_status_and_reason():
    async with open_plane(options=IngressOptions(max_body_bytes=2000), step_s=0.05) as plane:
        plane.model.max_concurrent_requests = 1
        body = {"model": "m", "prompt": PROMPT, "max_tokens": 3}
        await post(plane, "/v1/completions", **body)
        holder = asyncio.create_task(post(plane, "/v1/completions", **body | {"max_tokens": 200}))
        await plane.until(lambda: plane.client.num_running == 1)
        wrong = [body, body | {"model": "none"}, body | {"max_tokens": -1}, {"prompt": "a" * 2000}]
        for each in wrong:
            await plane.http.post("/v1/completions", json=each)
        holder.cancel()
        await plane.until(lambda: plane.client.num_running == 0)
        for path in ("/ready", "/health", "/v1/models"):
            await plane.http.get(path)
        text = (await plane.http.get("/metrics")).text
    name = "trunkline_http_requests_total reason="
    found = {k.removeprefix(name): v for k, v in samples(text).items() if k.startswith(name) and v}
    assert found == {
        " status=200": 1,
        "too_many_requests status=429": 1,
        "model_not_found status=404": 1,
        "invalid_request_error status=400": 1,
        "body_too_large status=413": 1,
        "client_left status=499": 1,
    }


def test_a_histogram_counts_up_to_its_bounds():
    histogram = Histogram((1, 2))
    for value in (0.5, 1, 1.5, 2, 3):
        histogram.add(value)
    assert (histogram.counts, histogram.total) == ([2, 2, 1], 8)
    told = [(s.suffix, s.labels.get("le"), s.value) for s in histogram.samples("f", {"a": "b"})]
    buckets = [("_bucket", bound, count) for bound, count in (("1", 2), ("2", 4), ("+Inf", 5))]
    assert told == [*buckets, ("_sum", None, 8), ("_count", None, 5)]
