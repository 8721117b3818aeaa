"""Bad words and allowed tokens over HTTP, on a real engine with tiny weights."""

from __future__ import annotations

import pytest

PROMPT = "ab 12 true"
CHAT = [{"role": "user", "content": PROMPT}]
DRAWN = {"temperature": 1.5, "seed": 3, "max_tokens": 24, "ignore_eos": True}


async def ask(plane, path, **fields):
    body = {"prompt": PROMPT} if path != "/v1/chat/completions" else {"messages": CHAT}
    response = await plane.http.post(path, json={"model": "m", **DRAWN, **body, **fields})
    assert response.status_code == 200, response.text
    answer = response.json()
    if path == "/generate":
        return answer.get("texts", [answer["text"]])
    return [c["text"] if "text" in c else c["message"]["content"] for c in answer["choices"]]


@pytest.fixture(autouse=True)
def chat_template(tiny_plane):
    tiny_plane.model.allow_request_chat_templates = True
    tiny_plane.model.tokenizer.chat_template = "{{ messages[0].content }}"


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate"])
async def test_outputs_are_made_of_allowed_tokens(tiny_plane, path, n):
    ids = tiny_plane.model.tokenizer.encode("abc")
    assert {*tiny_plane.model.tokenizer.decode(ids)} == {*"abc"}
    texts = await ask(tiny_plane, path, allowed_token_ids=ids, n=n)
    assert len(texts) == len({*texts}) == n
    assert {*"".join(texts)} == {*"abc"}
    (greedy,) = await ask(tiny_plane, path, allowed_token_ids=ids, temperature=0.0)
    assert {*greedy} <= {*"abc"}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate"])
async def test_outputs_hold_no_bad_word(tiny_plane, path):
    """The words are those that the output would hold, of one token and of several."""
    allowed = {"allowed_token_ids": [*range(32, 100)]}  # single characters
    (plain,) = await ask(tiny_plane, path, **allowed)
    words = [plain[5], plain[9:11], plain[14:18]]
    assert plain[5] not in plain[:5] and not any(word.isspace() for word in words)
    (text,) = await ask(tiny_plane, path, **allowed, bad_words=words)
    assert not [word for word in words if word in text]
    assert (text[:5], len(text)) == (plain[:5], len(plain))
