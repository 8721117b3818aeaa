"""What the clients of a soak ask for: every way to ask, each a few times."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.serving.conversations import WORDS
from benchmarks.serving.load import Target

Body = dict[str, Any]

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
_STREAM: Body = {"stream": True, "stream_options": {"include_usage": True}}


@dataclass(frozen=True)
class Script:
    """One request, which always has the same answer."""

    name: str
    path: str
    body: bytes
    status: int = 200
    """Of the answer of a server that is not disturbed."""

    def request(self, target: Target) -> bytes:
        """The request as HTTP."""
        return (
            f"POST {self.path} HTTP/1.1\r\nHost: {target.host}:{target.port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(self.body)}\r\n\r\n"
        ).encode() + self.body


def draw_scripts(model: str, longest: int, variants: int, seed: int) -> list[Script]:
    """Requests of all kinds.

    Args:
        model: name of the model.
        longest: tokens of output; most are shorter.
        variants: of each kind.
        seed: of all that is random.
    """
    return [
        script
        for number in range(variants)
        for script in _one_of_each(model, longest, random.Random(1000 * seed + number))
    ]


def _one_of_each(model: str, longest: int, rng: random.Random) -> Iterator[Script]:
    for name, (path, make) in _KINDS.items():
        body = {"model": model, "max_tokens": rng.randint(longest // 10, longest)}
        body |= {"ignore_eos": True, "temperature": 1.0, "seed": rng.randrange(2**31)}
        yield Script(name, path, json.dumps(body | make(rng)).encode())
    for name, change in _BAD.items():
        body = {"model": model, "prompt": _words(rng, 8), "max_tokens": 8} | change
        status = 404 if "model" in change else 400
        yield Script(name, COMPLETIONS, json.dumps(body).encode(), status)
    yield Script("bad JSON", CHAT, b'{"model": ', 400)


def _words(rng: random.Random, count: int) -> str:
    return "".join(f" {word}" for word in rng.choices(WORDS, k=count))


def _prompt(rng: random.Random) -> Body:
    return {"prompt": _words(rng, rng.randint(8, 200))}


def _stopped(rng: random.Random) -> Body:
    """Ends at a word of the prompt that the answer comes to, or at two of them."""
    words = rng.sample(WORDS, 60)
    first = rng.randint(20, 58)
    stop = [words[first], f"{words[first - 10]} {words[first - 9]}"]
    return {"prompt": " " + " ".join(words), "stop": stop}


def _messages(rng: random.Random) -> Body:
    turns = [("system", 20), ("user", 40), ("assistant", 60), ("user", 30)]
    return {"messages": [{"role": role, "content": _words(rng, n)} for role, n in turns]}


_KINDS: dict[str, tuple[str, Callable[[random.Random], Body]]] = {
    "completion, streamed": (COMPLETIONS, lambda rng: _prompt(rng) | _STREAM),
    "completion": (COMPLETIONS, _prompt),
    "chat, streamed": (CHAT, lambda rng: _messages(rng) | _STREAM),
    "chat": (CHAT, _messages),
    "stop strings, streamed": (COMPLETIONS, lambda rng: _stopped(rng) | _STREAM),
    "stop strings": (COMPLETIONS, _stopped),
    "n = 3, streamed": (COMPLETIONS, lambda rng: _prompt(rng) | _STREAM | {"n": 3}),
    "n = 2, chat": (CHAT, lambda rng: _messages(rng) | {"n": 2}),
    "logprobs, streamed": (COMPLETIONS, lambda rng: _prompt(rng) | _STREAM | {"logprobs": 2}),
    "logprobs, chat": (CHAT, lambda rng: _messages(rng) | {"logprobs": True, "top_logprobs": 2}),
    "two prompts": (COMPLETIONS, lambda rng: {"prompt": [_words(rng, 30), _words(rng, 50)]}),
}
_BAD: dict[str, Body] = {
    "no tokens asked for": {"max_tokens": 0},
    "unknown model": {"model": "another"},
    "too long": {"prompt": " long" * 20_000},
    "wrong type": {"temperature": "warm"},
}
