"""The application over a real engine whose tiny random model knows bytes, without Ray."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from deployments.config import ModelOptions
from deployments.engine_actor import EngineActor
from deployments.ingress.app import build_asgi_app
from deployments.ingress.deployment import load_served_model
from deployments.ingress.served import ServedModels
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams
from engine.startup import start_engine
from tests.deployments.plane import DEPLOYMENT, OPTIONS, Plane
from tests.engine.byte_model import write_byte_model
from tests.engine.conftest import tiny_config

CHAT_TEMPLATE = (
    "{{ extra }}{{ reasoning_effort }}{{ documents }}{{ tools }}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if not (loop.last and continue_final_message) %}</>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% if think %}<think>{% endif %}{% endif %}"
)
"""Tells whatever it is told."""
FIRST_TOKEN = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}


class Server:
    """The application, in an event loop that runs while a request does.

    It serves one engine by two names: `m`, and `thinker`, whose answers have thinking in them.
    """

    def __init__(self, runner: asyncio.Runner, folder: Path) -> None:
        self._run = runner.run
        self._context = self._open(folder)
        self._http = self._run(self._context.__aenter__())
        self.last_request = EngineRequest("", [], SamplingParams())
        """What the engine was asked last."""

    def close(self) -> None:
        self._run(self._context.__aexit__(None, None, None))

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        return self._run(self._http.request(method, path, json=body))

    @asynccontextmanager
    async def _open(self, folder: Path) -> AsyncIterator[httpx.AsyncClient]:
        config = tiny_config(_write_model(folder), max_model_len=512, enable_prefix_caching=False)
        actor = EngineActor(config, start_engine)
        await actor.start()
        plane = Plane({"e0": actor}, None, OPTIONS)
        plane.table.set_members(DEPLOYMENT, {"e0": actor})
        plane.hub.follow(DEPLOYMENT)
        await plane.until(lambda: plane.hub.connected(DEPLOYMENT))
        plain = ModelOptions(engine=config, tool_call_parser="hermes")
        thinker = ModelOptions(engine=config, reasoning_parser="qwen3")
        served = {
            name: load_served_model(name, options, OPTIONS, plane.client)
            for name, options in (("m", plain), ("thinker", thinker))
        }
        self._start, plane.client.start = plane.client.start, self._note
        app = build_asgi_app(ServedModels(served), OPTIONS)
        transport = httpx.ASGITransport(app)
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
                yield http
        finally:
            await plane.http.aclose()
            await actor.drain()
            plane.table.set_members(DEPLOYMENT, [])
            await asyncio.sleep(0)

    def _note(self, requests: list[EngineRequest], *more: Any) -> Any:
        self.last_request = requests[0]
        return self._start(requests, *more)


def _write_model(folder: Path) -> str:
    model = write_byte_model(folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["post_processor"] = FIRST_TOKEN
    file.write_text(json.dumps(tokenizer))
    settings = {"chat_template": CHAT_TEMPLATE, "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return model
