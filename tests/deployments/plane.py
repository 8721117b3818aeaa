"""The whole plane without Ray: engine actors, trunks and routes in one event loop."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import httpx

from deployments.engine_actor import EngineActor
from deployments.engine_client import EngineClient
from deployments.failover import FailoverLimits
from deployments.ingress.app import build_asgi_app
from deployments.ingress.options import IngressOptions
from deployments.ingress.served import ServedModel, ServedModels
from deployments.load_table import LoadTable
from deployments.placement import Booking, PrefixLoad
from deployments.trunk import TrunkHub
from deployments.wire import decode_report
from engine.config import EngineConfig
from engine.errors import EngineDead
from engine.model_source import resolve_model
from engine.tokenizer import Tokenizer
from tests.deployments.fake_core import FakeCore, FakeInfo, expected_tokens

DEPLOYMENT = "Engine-m"
MAX_MODEL_LEN = 256
PROMPT = "one two three four"
COMPLETION = {"model": "m", "prompt": "hi", "max_tokens": 2}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
OPTIONS = IngressOptions(max_body_bytes=100_000)


@cache
def bundled_tokenizer() -> Tokenizer:
    return Tokenizer.load(resolve_model("smollm2-135m-instruct"))


def echo(prompt: str, count: int) -> str:
    """The text of the first tokens that the fake core generates."""
    tokenizer = bundled_tokenizer()
    return tokenizer.decode(expected_tokens(tokenizer.encode(prompt), count))


def events(text: str) -> list[Any]:
    """What a stream of the server holds."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


class LocalLink:
    """Calls an engine actor in this loop."""

    def __init__(self, actor: EngineActor) -> None:
        self.broken = asyncio.Event()
        """Set, it breaks the trunk."""
        self._actor = actor
        self._calls: set[asyncio.Future[None]] = set()

    async def subscribe(self, subscriber_id: str) -> AsyncIterator[bytes]:
        broken = asyncio.ensure_future(self.broken.wait())
        async with aclosing(self._actor.subscribe(subscriber_id)) as messages:
            while True:
                message = asyncio.ensure_future(anext(messages, None))
                try:
                    await asyncio.wait((message, broken), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    message.cancel()
                    await asyncio.wait((message,))
                if broken.done():
                    raise ConnectionError("cut")
                if (data := message.result()) is None:
                    return
                yield data

    def submit(self, batch: bytes) -> asyncio.Future[None]:
        return asyncio.ensure_future(self._actor.submit(batch))

    def acknowledge(self, subscriber_id: str, count: int) -> None:
        self._calls.add(asyncio.ensure_future(self._actor.acknowledge(subscriber_id, count)))

    def abort(self, request_ids: list[str]) -> None:
        self._calls.add(asyncio.ensure_future(self._actor.abort(request_ids)))


class LocalCall:
    """A unary Serve call in this loop."""

    def __init__(self, work: Any) -> None:
        self.task = asyncio.ensure_future(work)

    def __await__(self) -> Any:
        return self.task.__await__()

    def cancel(self) -> None:
        self.task.cancel()


class LocalHandle:
    """A Serve handle whose router books in the table and whose replicas are engine actors."""

    deployment_name = DEPLOYMENT

    def __init__(self, table: LoadTable, actors: dict[str, EngineActor]) -> None:
        self._table = table
        self._actors = actors
        self.generate = SimpleNamespace(remote=lambda *args: LocalCall(self._generate(*args)))
        self.failure: Exception | None = None
        self.set_limit(1000)
        self._ends: dict[tuple[str, str], asyncio.Future[str]] = defaultdict(
            asyncio.get_running_loop().create_future
        )
        """By engine and request, as its replica has them."""
        self._watchers = [asyncio.ensure_future(self._watch(i)) for i in actors]

    async def _generate(self, booking: Booking) -> str:
        if self.failure is not None:
            raise self.failure
        chosen = self._table.engine_of(booking.request_id)
        while chosen is None and (chosen := self._table.book(self._limits, booking)) is None:
            await asyncio.sleep(0.01)
        return await self._ends[chosen, booking.request_id]

    def set_limit(self, limit: int) -> None:
        """Set the most requests of an engine."""
        self._limits = dict.fromkeys(self._actors, limit)
        self._table.set_rules(DEPLOYMENT, self._limits, PrefixLoad())

    async def _watch(self, engine_id: str) -> None:
        async for report in self._actors[engine_id].watch():
            for notice in decode_report(report).ended:
                end = self._ends[engine_id, notice.request_id]
                if not end.done():
                    end.set_result(notice.reason)
        for (engine, _), end in self._ends.items():
            if engine == engine_id and not end.done():
                end.set_exception(EngineDead("it died"))


class Plane:
    def __init__(
        self,
        actors: dict[str, EngineActor],
        tokenizer: Tokenizer | None,
        options: IngressOptions,
    ) -> None:
        self.table = LoadTable()
        self.actors = actors
        self.links = {engine_id: LocalLink(actor) for engine_id, actor in actors.items()}
        self.hub = TrunkHub("ingress-test", self.table, connect=self.links.__getitem__)
        self.handle = LocalHandle(self.table, actors)
        limits = FailoverLimits(max_barren_tries=2, timeout_s=3.0)
        self.client = EngineClient(self.handle, self.hub, self.table, failover=limits)
        self.model = ServedModel(
            name="m",
            tokenizer=tokenizer,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=49152,
            hidden_size=FakeInfo.hidden_size,
            client=self.client,
            max_concurrent_requests=64,
            retry_after_s=3,
        )
        self.app = build_asgi_app(ServedModels({"m": self.model}), options)
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app), base_url="http://test", timeout=20
        )

    async def idle(self) -> None:
        """Wait until no engine has anything to do."""
        await self.until(lambda: all(v.load.num_running == 0 for v in self.view()))

    def view(self) -> list[Any]:
        return self.table.view(DEPLOYMENT)

    async def cut(self, engine_id: str, *, for_good: bool = False) -> None:
        """Break the trunk to an engine."""
        self.links[engine_id].broken.set()
        await self.until(lambda: engine_id not in self.hub._dispatch.links)
        if not for_good:
            self.links[engine_id].broken.clear()

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.005)


@asynccontextmanager
async def open_plane(
    num_engines: int = 1,
    tokenizer: Tokenizer | None = None,
    options: IngressOptions = OPTIONS,
    **fake: Any,
) -> AsyncIterator[Plane]:
    """Start engines around fake cores and an ingress that is connected to them."""
    config = EngineConfig(model="smollm2-135m-instruct", max_num_seqs=16)
    actors = {f"e{i}": EngineActor(config, partial(FakeCore, **fake)) for i in range(num_engines)}
    for actor in actors.values():
        await actor.start()
    plane = Plane(actors, tokenizer or bundled_tokenizer(), options)
    plane.table.set_members(DEPLOYMENT, actors)
    plane.hub.follow(DEPLOYMENT)
    await plane.until(lambda: len(plane.hub.connected(DEPLOYMENT)) == num_engines)
    try:
        yield plane
        await plane.until(lambda: not plane.client._watchers)  # every call has ended
    finally:
        await plane.http.aclose()
        for actor in actors.values():
            await actor.drain()
        plane.table.set_members(DEPLOYMENT, [])
        await asyncio.sleep(0)
