"""A server with OpenAI's API in the test's own event loop, whose bytes a test decides."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from benchmarks.serving.conversations import echo
from benchmarks.serving.load import Target

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/event-stream\r\n\r\n"
Handler = Callable[[dict, asyncio.StreamWriter], Awaitable[None]]


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def events(texts: list[str], prompt_tokens: int, request_id: str = "cmpl-1") -> list[bytes]:
    """The events of an answer, a text each, with usage and [DONE]."""
    values = [{"id": request_id, "choices": [{"text": text}]} for text in texts]
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": len(texts)}
    values.append({"id": request_id, "choices": [], "usage": usage})
    return [f"data: {json.dumps(v)}\n\n".encode() for v in values] + [b"data: [DONE]\n\n"]


def answer(texts: list[str], prompt_tokens: int = 1) -> bytes:
    chunks = b"".join(chunk(event) for event in events(texts, prompt_tokens))
    return HEAD + chunks + b"0\r\n\r\n"


async def echoing(body: dict, writer: asyncio.StreamWriter) -> None:
    """Answer as the fake engine does."""
    text = echo(body["prompt"], body["max_tokens"])
    writer.write(answer([f" {word}" for word in text.split()], body["prompt"].count(" ")))


@asynccontextmanager
async def serve(handler: Handler) -> AsyncIterator[Target]:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                await handler(json.loads(await reader.readexactly(length)), writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    try:
        yield Target(host, port, "m", timeout_s=5.0)
    finally:
        server.close()
