"""Log-probabilities in answers."""

from __future__ import annotations

import json

import pytest

from deployments.protocols.logprobs import completion_logprobs
from engine.outputs import Logprob, TokenLogprobs
from tests.deployments.fake_core import FakeCore
from tests.deployments.plane import MAX_MODEL_LEN, bundled_tokenizer, open_plane

TEXT = "smile \U0001f600\U0001f680 caf\u00e9"


class LogprobCore(FakeCore):
    """Gives each token a log-probability, and the next token id as an alternative."""

    def _advance(self, request):
        delta = super()._advance(request)
        delta.logprobs = [
            TokenLogprobs([i, i, i + 1], [-0.5, -0.5, -1.5], 1) for i in delta.token_ids
        ]
        return delta


@pytest.mark.parametrize("stream", [False, True])
async def test_bytes_of_chat_logprobs_join_to_the_text(monkeypatch, stream):
    monkeypatch.setattr("tests.deployments.plane.FakeCore", LogprobCore)
    tokenizer = bundled_tokenizer()
    ids = tokenizer.encode(TEXT)
    assert "\ufffd" in "".join(map(tokenizer.token_text, ids))  # a character spans tokens
    async with open_plane() as plane:
        plane.model.tokenizer = tokenizer
        monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *_, **__: TEXT)
        body = {"model": "m", "messages": [{"role": "user", "content": "-"}], "stream": stream}
        body |= {"max_tokens": len(ids), "logprobs": True, "top_logprobs": 2}
        response = await plane.http.post("/v1/chat/completions", json=body)
    entries = _streamed(response.text) if stream else _whole(response.json())
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == TEXT
    for token, entry in zip(ids, entries, strict=True):
        best, other = entry["top_logprobs"]
        assert best["bytes"] == entry["bytes"]
        assert bytes(other["bytes"]) == tokenizer.token_bytes(False)[token + 1]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_tokens_are_named_by_their_ids(monkeypatch, path):
    monkeypatch.setattr("tests.deployments.plane.FakeCore", LogprobCore)
    async with open_plane() as plane:
        chat = path == "/v1/chat/completions"
        body = {"model": "m", "max_tokens": 4, "return_token_ids": True}
        body |= {"return_tokens_as_token_ids": True}
        if chat:
            body |= {"messages": [{"role": "user", "content": TEXT}], "logprobs": True}
        else:
            body |= {"prompt": TEXT, "logprobs": 1}
        (choice,) = (await plane.http.post(path, json=body)).json()["choices"]
    names = [f"token_id:{token}" for token in choice["token_ids"]]
    assert len(names) == 4
    if chat:
        assert [entry["token"] for entry in choice["logprobs"]["content"]] == names
    else:
        assert choice["logprobs"]["tokens"] == names
        assert [[*top] for top in choice["logprobs"]["top_logprobs"]] == [[name] for name in names]


def test_alternatives_of_equal_text_are_kept_apart():
    entry = {
        7: Logprob(-3.0, 9, "\ufffd"),
        5: Logprob(-0.5, 1, "\ufffd"),
        6: Logprob(-0.7, 2, "\ufffd"),
        4: Logprob(-0.9, 3, "a"),
    }
    (top,) = completion_logprobs([entry], 2, [0])["top_logprobs"]
    assert top == {"\ufffd": -0.5, "token_id:6": -0.7, "token_id:7": -3.0}


def test_the_sampled_token_is_listed_once():
    entry = {5: Logprob(-0.5, 1, "x"), 6: Logprob(-0.7, 2, "y")}
    (top,) = completion_logprobs([entry], 2, [0])["top_logprobs"]
    assert top == {"x": -0.5, "y": -0.7}


def _whole(answer):
    return answer["choices"][0]["logprobs"]["content"]


def _streamed(text):
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    chunks = [json.loads(line) for line in lines if line != "[DONE]"]
    found = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    return [entry for logprobs in found if logprobs for entry in logprobs["content"]]


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities_under_way_are_bounded(stream):
    """2 completions of 3 + 20 tokens: 2 * (3 * 5 of the prompt + 20 * 3 of the output)."""
    async with open_plane(step_s=0.001) as plane:
        body = {"model": "m", "prompt": [1, 2, 3], "max_tokens": 20, "n": 2, "logprobs": 2}
        count = 2 * 20 * 3
        if stream:
            body["stream"] = True
        else:
            body["prompt_logprobs"] = 4
            count += 2 * 3 * 5
        plane.model.logprobs.limit = count - 1
        refused = await plane.http.post("/v1/completions", json=body)
        assert (refused.status_code, f"{count} log-prob" in refused.text) == (400, True)
        plane.model.logprobs.limit = count
        assert (await plane.http.post("/v1/completions", json=body)).status_code == 200
        assert plane.model.logprobs.held == 0
        plane.model.logprobs.held = 1  # of another request
        full = await plane.http.post("/v1/completions", json=body)
        assert (full.status_code, full.headers["retry-after"]) == (429, "3")
        plain = {"model": "m", "prompt": [1, 2, 3], "max_tokens": 2}
        plane.model.logprobs.held = count
        assert (await plane.http.post("/v1/completions", json=plain)).status_code == 200
        assert (plane.model.logprobs.held, plane.client.num_running) == (count, 0)


async def test_output_without_a_limit_counts_as_the_longest(monkeypatch):
    async with open_plane() as plane:
        plane.model.logprobs.limit = MAX_MODEL_LEN // 2
        messages = [{"role": "user", "content": "hi"}]
        body = {"model": "m", "messages": messages, "logprobs": True}
        limited = await plane.http.post("/v1/chat/completions", json={**body, "max_tokens": 9})
        assert limited.status_code == 200
        refused = await plane.http.post("/v1/chat/completions", json=body)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "logprobs"
