"""What the ingress computes for a chat before an engine has it, as a whole and by parts.

Processor time of the process, its threads included: time spent waiting costs nobody anything. A
fifth of the words is new with every chat, as tokenizers remember those that they have seen. `whole`
is a chat that is new; for `next turn` it has come before without its last two messages.
Needs no GPU.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import string
import time
from collections.abc import Callable, Iterator
from typing import cast

from benchmarks.models import BUNDLED_MODEL, find_model
from benchmarks.probes.records import Record, spread_record
from benchmarks.serving.conversations import WORDS
from deployments.engine_client import EngineClient
from deployments.ingress.prompts import chat_prompt
from deployments.ingress.served import ServedModel, build_jobs
from deployments.protocols.body import parse_body, read_body
from deployments.protocols.openai import ChatBody
from engine.job import Job
from engine.model_source import resolve_model
from engine.tokenizer import Tokenizer

_NEW_SHARE = 0.2
"""Of words."""
_PUNCTUATION = 0.1
"""Words that a comma or a full stop follows."""
_MAX_MODEL_LEN = 1 << 20


def measure(
    num_tokens: int = 1000, messages: tuple[int, ...] = (1, 9, 41), chats: int = 100
) -> Iterator[Record]:
    """Measure chats of the bundled model.

    Args:
        num_tokens: of a chat, about.
        messages: how many a chat is divided into, the last of a user.
        chats: to measure each way.
    """
    tokenizer = Tokenizer.load(resolve_model(find_model(BUNDLED_MODEL)))
    rng = random.Random(0)
    for count in messages:
        bodies = [_body(rng, tokenizer, num_tokens, count) for _ in range(chats)]
        tokens = statistics.median(len(_encode(tokenizer, data)) for data in bodies)
        shape = {"tokens": round(tokens), "messages": count}
        for method, prepare in _methods(tokenizer).items():
            if method == "next turn" and count < 3:
                continue
            # New chats for each method: the one before has taught the tokenizer its words.
            bodies = [_body(rng, tokenizer, num_tokens, count) for _ in range(chats)]
            yield spread_record(method, shape, _cpu_seconds(prepare, bodies))


def _methods(tokenizer: Tokenizer) -> dict[str, Callable[[bytes], Callable[[], object]]]:
    """Name → what takes a body and returns what is timed."""

    def template(data: bytes) -> Callable[[], str]:
        messages = parse_body(ChatBody, data).messages
        return lambda: tokenizer.apply_chat_template(messages)

    def encode(data: bytes) -> Callable[[], list[int]]:
        text = tokenizer.apply_chat_template(parse_body(ChatBody, data).messages)
        return lambda: tokenizer.encode(text, add_special_tokens=False)

    loop, model = asyncio.new_event_loop(), _model(tokenizer)

    def whole(data: bytes) -> Callable[[], object]:
        return lambda: loop.run_until_complete(_prepare(model, data))

    def next_turn(data: bytes) -> Callable[[], object]:
        earlier = json.loads(data)
        del earlier["messages"][-2:]
        whole(json.dumps(earlier).encode())()
        return whole(data)

    return {
        "whole": whole,
        "next turn": next_turn,
        "validate": lambda data: lambda: parse_body(ChatBody, data).to_params(),
        "template": template,
        "encode": encode,
    }


async def _prepare(model: ServedModel, data: bytes) -> list[Job]:
    """What `handle_chat` does up to the choice of an engine."""
    body = await read_body(ChatBody, data)
    params, tool_use = body.to_params(), body.tool_use()
    body.check_stream_options()
    body.check_template_options(model.allow_request_chat_templates)
    prompt = await chat_prompt(model, body, body.messages, tool_use, len(data))
    return await build_jobs(model, "chatcmpl-0", [prompt.token_ids], params, param="messages")


def _model(tokenizer: Tokenizer) -> ServedModel:
    """A model without engines, which nothing here asks for."""
    return ServedModel(
        name=BUNDLED_MODEL,
        tokenizer=tokenizer,
        max_model_len=_MAX_MODEL_LEN,
        vocab_size=tokenizer.vocab_size,
        client=cast(EngineClient, None),
        max_concurrent_requests=1,
        retry_after_s=1,
    )


def _cpu_seconds(
    prepare: Callable[[bytes], Callable[[], object]], bodies: list[bytes]
) -> list[float]:
    """Of each body, after a tenth of them that are not counted."""
    seconds = []
    for data in bodies:
        work = prepare(data)
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return seconds[len(bodies) // 10 :]


def _encode(tokenizer: Tokenizer, data: bytes) -> list[int]:
    return tokenizer.encode_chat(json.loads(data)["messages"])


def _body(rng: random.Random, tokenizer: Tokenizer, num_tokens: int, messages: int) -> bytes:
    """A streamed chat of about so many tokens."""
    sample = _text(rng, 200)
    tokens_per_word = len(tokenizer.encode(sample, add_special_tokens=False)) / 200
    frame = len(tokenizer.encode_chat(_chat([""] * messages)))
    words = max(1, round((num_tokens - frame) / tokens_per_word / messages))
    chat = _chat([_text(rng, words) for _ in range(messages)])
    options = {"model": BUNDLED_MODEL, "stream": True, "temperature": 0.7, "max_tokens": 256}
    return json.dumps({**options, "messages": chat}).encode()


def _chat(texts: list[str]) -> list[dict[str, str]]:
    """Turns that end with the user's, after a system message."""
    roles = ["user" if (len(texts) - place) % 2 else "assistant" for place in range(len(texts))]
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    return [{"role": "system", "content": "You are a helpful assistant."}, *turns]


def _text(rng: random.Random, words: int) -> str:
    return " ".join(_word(rng) for _ in range(words))


def _word(rng: random.Random) -> str:
    end = rng.choice(",.") if rng.random() < _PUNCTUATION else ""
    if rng.random() < _NEW_SHARE:
        return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(4, 9))) + end
    return rng.choice(WORDS) + end
