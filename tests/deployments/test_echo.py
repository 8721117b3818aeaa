"""Prompts that come again with their log-probabilities, from a real engine with tiny weights."""

from __future__ import annotations

import itertools
import threading
from collections import Counter

import pytest
import torch

from deployments.ingress import echo, served
from engine import output_processor
from engine.outputs import TokenDelta, TokenLogprobs
from tests.deployments.fake_core import FakeCore
from tests.deployments.plane import events, open_plane

torch.set_num_threads(1)
TEXT = 'cab {"\U0001f600": "\xe9 12"}'
"""Has tokens of several characters, and characters of several tokens."""


async def ask(plane, **fields):
    """The choices of an answer; those of a stream put together."""
    body = {"model": "m", "temperature": 0.0, "echo": True, **fields}
    response = await plane.http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    if not body.get("stream"):
        return response.json()["choices"]
    chunks = [chunk["choices"][0] for chunk in events(response.text) if chunk["choices"]]
    return [
        joined([c for c in chunks if c["index"] == i])
        for i in range(1 + max(chunk["index"] for chunk in chunks))
    ]


def joined(chunks):
    scored = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"]]
    logprobs = {
        key: [x for part in scored for x in part[key]] if scored[0][key] is not None else None
        for key in (scored[0] if scored else ())
    }
    text = "".join(chunk["text"] for chunk in chunks)
    return {**chunks[-1], "text": text, "logprobs": logprobs or None}


def reference(model, token_ids):
    """Log-probabilities of what follows each token, float32 [tokens, vocab]."""
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1, 5])
async def test_scores_of_prompt_and_output_are_those_of_transformers(
    tiny_plane, tiny_checkpoint, max_tokens, stream
):
    fields = {"max_tokens": max_tokens, "logprobs": 3, "ignore_eos": True}
    (choice,) = await ask(tiny_plane, prompt=TEXT, stream=stream, return_token_ids=True, **fields)
    tokenizer, scores = tiny_plane.model.tokenizer, choice["logprobs"]
    prompt = tokenizer.encode(TEXT)
    (named,) = await ask(tiny_plane, prompt=TEXT, return_tokens_as_token_ids=True, **fields)
    ids = [int(name.removeprefix("token_id:")) for name in named["logprobs"]["tokens"]]
    assert ids[: len(prompt)] == prompt and len(ids) == len(prompt) + max_tokens
    assert scores["tokens"] == [tokenizer.token_text(i) for i in ids]
    assert scores["token_logprobs"] == named["logprobs"]["token_logprobs"]
    wanted = reference(tiny_checkpoint[1], ids)
    assert (scores["token_logprobs"][0], scores["top_logprobs"][0]) == (None, None)
    for place in range(1, len(ids)):
        before = wanted[place - 1]
        assert scores["token_logprobs"][place] == pytest.approx(before[ids[place]].item(), abs=1e-4)
        top = {int(name[9:]): p for name, p in named["logprobs"]["top_logprobs"][place].items()}
        assert set(top) == {*before.topk(3).indices.tolist(), ids[place]}
        assert top == pytest.approx({i: before[i].item() for i in top}, abs=1e-4)
    assert choice["text"].startswith(TEXT)
    assert choice["finish_reason"] == "length"
    assert choice["text"] == TEXT + tokenizer.decode(ids[len(prompt) :])


async def test_offsets_say_where_tokens_are_in_the_text(tiny_plane):
    (choice,) = await ask(
        tiny_plane, prompt=TEXT, max_tokens=3, logprobs=0, logit_bias={"100": 100}
    )
    scores, text = choice["logprobs"], choice["text"]
    assert scores["top_logprobs"] is None
    assert all(a <= b for a, b in itertools.pairwise(scores["text_offset"]))
    for token, offset in zip(scores["tokens"], scores["text_offset"], strict=True):
        if "\ufffd" not in token:
            assert text[offset : offset + len(token)] == token
    smile = scores["text_offset"][scores["tokens"].index("\ufffd") :][:4]
    assert smile == [TEXT.index("\U0001f600")] * 4  # its first three bytes are no character yet


async def test_harnesses_score_continuations_of_token_ids(tiny_plane, tiny_checkpoint):
    """As EleutherAI's evaluation harness does: a batch of token ids, the last token dropped."""
    contexts, continuations = ["the ab", "12"], ["cd", "true false"]
    pairs = [
        tuple(map(tiny_plane.model.tokenizer.encode, pair))
        for pair in zip(contexts, continuations, strict=True)
    ]
    fields = {"prompt": [a + b for a, b in pairs], "max_tokens": 1, "logprobs": 1}
    choices = await ask(tiny_plane, **fields)
    for choice, (context, continuation) in zip(choices, pairs, strict=True):
        scored = choice["logprobs"]["token_logprobs"][len(context) : -1]
        wanted = reference(tiny_checkpoint[1], context + continuation)[len(context) - 1 :]
        expected = [wanted[i, token].item() for i, token in enumerate(continuation)]
        assert scored == pytest.approx(expected, abs=1e-4)
        tops = choice["logprobs"]["top_logprobs"][len(context) : -1]
        assert [max(top.values()) for top in tops] == pytest.approx(
            wanted[: len(continuation)].amax(-1).tolist(), abs=1e-4
        )


@pytest.mark.parametrize("stream", [False, True])
async def test_nothing_may_be_asked_for_twice(tiny_plane, stream):
    fields = {"prompt": [TEXT, "ab"], "n": 2, "max_tokens": 0, "stream": stream}
    choices = await ask(tiny_plane, logprobs=1, **fields)
    assert [choice["text"] for choice in choices] == [TEXT, TEXT, "ab", "ab"]
    assert choices[0]["logprobs"] == choices[1]["logprobs"]
    assert [len(choice["logprobs"]["tokens"]) for choice in choices[2:]] == [1, 1]


async def test_usage_counts_nothing_that_was_not_wanted(tiny_plane):
    body = {"model": "m", "prompt": TEXT, "max_tokens": 0, "echo": True}
    answer = (await tiny_plane.http.post("/v1/completions", json=body)).json()
    assert answer["choices"][0]["text"] == TEXT
    assert answer["choices"][0]["logprobs"] is None
    assert "prompt_logprobs" not in answer["choices"][0]
    assert answer["usage"]["completion_tokens"] == 0
    scored = {**body, "echo": False, "prompt_logprobs": 1}
    answer = (await tiny_plane.http.post("/v1/completions", json=scored)).json()
    assert (answer["choices"][0]["text"], answer["usage"]["completion_tokens"]) == ("", 0)
    assert len(answer["choices"][0]["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]


async def test_prompts_of_chats_are_scored_alone(tiny_plane):
    tiny_plane.model.tokenizer.chat_template = "{{ messages[0].content }}"
    body = {"model": "m", "messages": [{"role": "user", "content": TEXT}], "prompt_logprobs": 0}
    body |= {"max_completion_tokens": 0, "return_token_ids": True}
    answer = (await tiny_plane.http.post("/v1/chat/completions", json=body)).json()
    first, *rest = answer["prompt_logprobs"]
    assert first is None
    assert [[*entry] for entry in rest] == [[str(i)] for i in answer["prompt_token_ids"][1:]]
    assert answer["choices"][0]["message"]["content"] == ""
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": TEXT, "prompt_logprobs": 0}),
        ("/v1/completions", {"prompt": TEXT, "echo": True, "logprobs": 0, "stream": True}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": TEXT}], "prompt_logprobs": 0},
        ),
    ],
)
async def test_scores_are_put_in_their_form_where_no_stream_waits(
    tiny_plane, monkeypatch, path, fields
):
    threads, convert = [], output_processor._to_dict

    def noting(entry, tokenizer):
        threads.append(threading.current_thread())
        return convert(entry, tokenizer)

    monkeypatch.setattr(output_processor, "_to_dict", noting)
    monkeypatch.setattr(served, "LONG_TEXT", 10)
    tiny_plane.model.tokenizer.chat_template = "{{ messages[0].content }}"
    answer = await tiny_plane.http.post(path, json={"model": "m", "max_tokens": 1, **fields})
    assert answer.status_code == 200, answer.text
    aside = [thread for thread in threads if thread is not threading.current_thread()]
    assert len(aside) == len(tiny_plane.model.tokenizer.encode(TEXT, False)) - 1


async def test_each_kind_of_scores_has_as_many_alternatives_as_were_asked_for(tiny_plane):
    fields = {"prompt": TEXT, "max_tokens": 2, "return_tokens_as_token_ids": True}
    num_tokens = len(tiny_plane.model.tokenizer.encode(TEXT))
    for logprobs, of_prompt in ((1, 4), (4, 1)):
        (choice,) = await ask(tiny_plane, logprobs=logprobs, prompt_logprobs=of_prompt, **fields)
        tops = choice["logprobs"]["top_logprobs"]
        assert {len(top) for top in tops[1:]} <= {logprobs, logprobs + 1}
        entries = choice["prompt_logprobs"]
        assert {len(entry) for entry in entries[1:]} <= {of_prompt, of_prompt + 1}
        assert len(tops) == len(entries) + 2 == num_tokens + 2


class LateCore(FakeCore):
    """Scores prompts of 7 tokens in 3 steps, while the other completions go on."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._scored = Counter()

    def _advance(self, request):
        done = self._scored[request.request_id]
        if request.params.prompt_logprobs is not None and done < 6:
            self._scored[request.request_id] += 2
            tokens = request.prompt_token_ids[1 + done : 3 + done]
            entries = [TokenLogprobs([i], [-i / 1000], 2) for i in tokens]
            return TokenDelta(request.request_id, [], prompt_logprobs=entries)
        delta = super()._advance(request)
        delta.logprobs = [TokenLogprobs([i], [-0.5], 1) for i in delta.token_ids]
        return delta


@pytest.mark.parametrize("stream", [False, True])
async def test_every_completion_begins_with_the_scores_of_the_prompt(monkeypatch, stream):
    """Only the first one asks for them, and others may be ahead of it."""
    monkeypatch.setattr("tests.deployments.plane.FakeCore", LateCore)
    async with open_plane(step_s=0.005) as plane:
        prompts = [[*range(100, 107)], [*range(200, 207)]]
        fields = {"n": 3, "max_tokens": 4, "logprobs": 0, "return_token_ids": True}
        choices = await ask(plane, prompt=prompts, stream=stream, **fields)
        texts = [plane.model.tokenizer.decode(ids, False) for ids in prompts]
    assert len(choices) == 6
    for index, choice in enumerate(choices):
        ids = prompts[index // 3]
        expected = [None, *(-i / 1000 for i in ids[1:]), *[-0.5] * 4]
        assert choice["logprobs"]["token_logprobs"] == expected
        assert choice["text"].startswith(texts[index // 3])
        assert choice["finish_reason"] == "length"


async def test_scores_of_a_long_prompt_are_formed_once_and_hold_up_no_other_stream(monkeypatch):
    monkeypatch.setattr("tests.deployments.plane.FakeCore", LateCore)
    monkeypatch.setattr(served, "LONG_TEXT", 6)
    threads, offsets = [], echo._offsets

    def noting_offsets(*args):
        threads.append(threading.current_thread())
        return offsets(*args)

    monkeypatch.setattr(echo, "_offsets", noting_offsets)
    async with open_plane() as plane:
        prompts = [[*range(100, 107)], [*range(200, 207)]]
        await ask(plane, prompt=prompts, n=3, max_tokens=4, logprobs=0, stream=True)
    assert len(threads) == len(prompts) and threading.main_thread() not in threads
