"""Plug-ins that are slow, hang or wait: they hold up nobody, and no thread or place for ever."""

from __future__ import annotations

import asyncio
import threading

import pytest

from deployments.ingress import plugged, plugin_threads
from deployments.ingress.plugin_threads import PluginThreads
from tests.deployments.plane import PROMPT, echo
from tests.deployments.plugins.asking import Ask, open_with


async def test_a_slow_plugin_holds_up_nobody_else():
    """Not even when all of its threads wait."""
    go_on = threading.Event()

    class Slow(Ask):
        def create_prompt(self, request, raw_request):
            go_on.wait()
            return request.prompt

    async with open_with(Slow) as plane:
        slow = [asyncio.create_task(plane.http.post("/ask/m", json={})) for _ in range(9)]
        body = {"prompt": f"{PROMPT} " * 20, "max_tokens": 3}
        try:
            for _ in range(3):
                answer = await plane.http.post("/generate", json=body)
                assert answer.status_code == 200
            assert not any(task.done() for task in slow)
        finally:
            go_on.set()  # else a failure would hang until the threads end
        for answer in await asyncio.gather(*slow):
            assert answer.json() == {"said": echo(PROMPT, 4)}


async def test_plugins_that_hang_keep_no_thread_from_the_others(monkeypatch, caplog):
    monkeypatch.setattr(plugin_threads, "TIME_LIMIT_S", 0.2)
    monkeypatch.setattr(plugin_threads, "MAX_LEFT_BEHIND", 5)
    go_on = threading.Event()

    class Hanging(Ask):
        def create_prompt(self, request, raw_request):
            if request.raises == "hang":
                go_on.wait()
            return request.prompt

    async with open_with(Hanging) as plane:

        async def ask(raises=""):
            return await plane.http.post("/ask/m", json={"raises": raises})

        try:
            for answer in await asyncio.gather(*(ask("hang") for _ in range(4))):
                assert answer.status_code == 504
                assert "takes too long" in answer.text
            assert "the plug-in Hanging has not ended" in caplog.text
            with monkeypatch.context() as patient:  # a busy machine may take long, too
                patient.setattr(plugin_threads, "TIME_LIMIT_S", 60)
                assert (await ask()).json() == {"said": echo(PROMPT, 4)}
            assert (await ask("hang")).status_code == 504
            assert (await ask()).status_code == 504  # as many are left behind as may be
        finally:
            go_on.set()
        async with asyncio.timeout(10):
            while (await ask()).status_code != 200:
                await asyncio.sleep(0.01)
        assert plane.model.num_preparing == 0


async def test_threads_that_begin_one_after_another_are_not_left_behind_without_end(monkeypatch):
    monkeypatch.setattr(plugin_threads, "TIME_LIMIT_S", 0.05)
    monkeypatch.setattr(plugin_threads, "MAX_LEFT_BEHIND", 1)
    threads, go_on = PluginThreads(), threading.Event()
    try:
        begun = [
            asyncio.create_task(threads.run(go_on.wait)) for _ in range(plugin_threads.THREADS)
        ]
        await asyncio.wait(begun)  # more than may be left behind, as they were under way together
        with pytest.raises(TimeoutError):
            await threads.run(lambda: pytest.fail("no thread should begin"))
    finally:
        go_on.set()
    await asyncio.gather(*begun, return_exceptions=True)


async def test_prompts_that_are_awaited_in_vain_end_too(monkeypatch):
    monkeypatch.setattr(plugged, "TIME_LIMIT_S", 0.05)

    class Endless(Ask):
        async def create_prompt(self, request, raw_request):
            await asyncio.Event().wait()

    async with open_with(Endless) as plane:
        assert (await plane.http.post("/ask/m", json={})).status_code == 500


async def test_a_client_that_leaves_meanwhile_holds_no_place():
    class Endless(Ask):
        async def create_prompt(self, request, raw_request):
            await asyncio.Event().wait()

    async with open_with(Endless) as plane:
        asking = asyncio.create_task(plane.http.post("/ask/m", json={}))
        await plane.until(lambda: plane.model.num_preparing == 1)
        asking.cancel()
        await plane.until(lambda: plane.model.num_preparing == 0)
