"""`text_offset`: where the tokens of a completion begin in its text, streamed and whole."""

from __future__ import annotations

from typing import Any

import pytest

from engine.outputs import TokenDelta, TokenLogprobs
from engine.request import EngineRequest
from tests.deployments.fake_core import FakeCore
from tests.deployments.plane import Plane, bundled_tokenizer, events, open_plane

WORDS = "one two three four five six"
SMILES = "hi \U0001f996\U0001f996 there you"
"""Has characters of several tokens."""


class ScoringCore(FakeCore):
    """Gives each token a log-probability, those of prompts included."""

    def _advance(self, request: EngineRequest) -> TokenDelta:
        is_first = not self._done[request.request_id]
        delta = super()._advance(request)
        delta.logprobs = _scores(delta.token_ids)
        if is_first:
            delta.prompt_logprobs = _scores(request.prompt_token_ids[1:])
        return delta


def _scores(token_ids: list[int]) -> list[TokenLogprobs]:
    return [TokenLogprobs([token], [-1.0], 1) for token in token_ids]


@pytest.fixture
async def scoring(monkeypatch):
    monkeypatch.setattr("tests.deployments.plane.FakeCore", ScoringCore)
    async with open_plane() as opened:
        yield opened


async def complete(plane: Plane, prompt: str, **more: Any) -> list[tuple[str, list[int]]]:
    """The text and the offsets of an answer, whole and streamed."""
    num_tokens = len(bundled_tokenizer().encode(prompt))
    body = {"model": "m", "prompt": prompt, "max_tokens": num_tokens, "logprobs": 0, **more}
    response = await plane.http.post("/v1/completions", json=body)
    (choice,) = response.json()["choices"]
    response = await plane.http.post("/v1/completions", json={**body, "stream": True})
    chunks = [chunk["choices"][0] for chunk in events(response.text)]
    offsets = [o for c in chunks if c["logprobs"] for o in c["logprobs"]["text_offset"]]
    streamed = "".join(chunk["text"] for chunk in chunks), offsets
    return [(choice["text"], choice["logprobs"]["text_offset"]), streamed]


@pytest.mark.parametrize("echo", [False, True])
async def test_text_that_waits_for_a_stop_string_is_counted(one_by_one, scoring, echo):
    whole, streamed = await complete(scoring, WORDS, stop=" two three four five seven", echo=echo)
    assert streamed == whole
    assert whole[1][-6:] == [len(WORDS) * echo + place for place in (0, 3, 7, 13, 18, 23)]


async def test_parts_of_a_character_take_no_room(one_by_one, scoring):
    whole, streamed = await complete(scoring, SMILES)
    assert streamed == whole == (SMILES, [0, 2, 3, 3, 4, 4, 4, 5, 11])


async def test_what_a_stop_string_cuts_off_is_counted_alike(one_by_one, scoring):
    whole, streamed = await complete(scoring, WORDS, stop="wo three fo")
    assert streamed == whole == ("one t", [0, 3, 7, 13])


async def test_special_tokens_that_are_left_out_take_no_room(one_by_one, scoring):
    prompt = "one<|im_end|> two"
    whole, streamed = await complete(scoring, prompt)
    assert streamed == whole == ("one two", [0, 3, 3])
    whole, streamed = await complete(scoring, prompt, skip_special_tokens=False)
    assert streamed == whole == (prompt, [0, 3, 13])
