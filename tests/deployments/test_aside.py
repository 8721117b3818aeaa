"""What would hold up the event loop happens beside it."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from deployments.aside import MAX_THREADS, run_aside
from deployments.ingress.served import LONG_TEXT
from engine.tokenizer import Tokenizer
from tests.deployments.plane import bundled_tokenizer, open_plane


async def test_work_of_cancelled_callers_is_not_done():
    begun, gate = threading.Semaphore(0), threading.Event()
    done: list[int] = []

    def hold() -> None:
        begun.release()
        gate.wait()

    holding = [asyncio.ensure_future(run_aside(hold)) for _ in range(MAX_THREADS)]
    await asyncio.to_thread(begun.acquire)  # the loop's own threads are free
    waiting = [asyncio.ensure_future(run_aside(lambda i=i: done.append(i))) for i in range(3)]
    await asyncio.sleep(0)
    waiting[1].cancel()
    await asyncio.wait(waiting[1:2])
    gate.set()
    await asyncio.gather(*holding, *waiting, return_exceptions=True)
    assert 1 not in done and {0, 2} <= set(done)


@pytest.mark.parametrize("length", [LONG_TEXT // 2, LONG_TEXT + 1])
@pytest.mark.parametrize("kind", ["completion", "chat"])
async def test_long_texts_are_prepared_beside_the_loop(kind, length, monkeypatch):
    threads: dict[str, bool] = {}
    here = threading.get_ident()

    def spy(name: str) -> None:
        original: Any = getattr(Tokenizer, name)

        def noted(self: Tokenizer, *args: Any, **options: Any) -> Any:
            threads[name] = threading.get_ident() != here
            return original(self, *args, **options)

        monkeypatch.setattr(Tokenizer, name, noted)

    spy("_encode")
    spy("apply_chat_template")
    text = " " * length  # few tokens
    chat = {"messages": [{"role": "user", "content": text}]}
    path = "/v1/chat/completions" if kind == "chat" else "/v1/completions"
    body = {"model": "m", "max_tokens": 1, **(chat if kind == "chat" else {"prompt": text})}
    async with open_plane(tokenizer=bundled_tokenizer()) as plane:
        response = await plane.http.post(path, json=body)
    assert response.status_code == 200, response.text
    names = {"_encode", "apply_chat_template"} if kind == "chat" else {"_encode"}
    assert threads == dict.fromkeys(names, length > LONG_TEXT)
