"""A plug-in that fails where it is told to, and planes that have it."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from pydantic import field_validator

from deployments.ingress.app import build_asgi_app
from deployments.ingress.options import IngressOptions
from deployments.ingress.served import ServedModels
from deployments.plugins import Body, InvalidRequest, SamplingParams, ServingEngine
from tests.deployments.plane import OPTIONS, PROMPT, Plane, open_plane

SECRET = "zyzzyva"


class AskBody(Body):
    prompt: str = PROMPT
    model: str | None = None
    stream: bool = False
    raises: str = ""
    """Method that fails."""

    @field_validator("raises")
    @classmethod
    def _fails(cls, value: str) -> str:
        return value if value != "validator" else {}[SECRET]


class Ask(ServingEngine[AskBody]):
    """Fails where it is told to."""

    path = "/ask/{model}"
    request_model = AskBody

    def create_prompt(self, request, raw_request):
        self._fail(request, "create_prompt")
        if request.raises == "refusal":
            raise InvalidRequest("prompt does not please.", "prompt")
        if request.raises == "StopIteration":
            next(iter(()))
        if request.raises == "exit":
            sys.exit(1)
        return None if request.raises == "nothing" else request.prompt

    def sampling_params(self, request):
        self._fail(request, "sampling_params")
        return SamplingParams(max_tokens=4)

    def create_response(self, request, output):
        self._fail(request, "create_response")
        return object() if request.raises == "json" else {"said": output.text}

    def create_chunk(self, request, index, delta):
        self._fail(request, "create_chunk")
        return {"said": delta.text} if delta.text else None

    def create_last_chunk(self, request, output):
        self._fail(request, "create_last_chunk")
        return {"all": output.text, "by": self.model_name}

    def create_error_response(self, message, **kw):
        if message == "Fail.":
            raise KeyError(SECRET)
        return {"oops": message, **kw}

    def _fail(self, request, method: str) -> None:
        if request.raises == method:
            raise KeyError(SECRET)


class Named(Ask):
    """Tells which instance answers."""

    path = "/named"

    def create_response(self, request, output):
        return {"by": self.model_name}


@asynccontextmanager
async def open_with(
    *plugins: type[ServingEngine[Any]], options: IngressOptions = OPTIONS, **fake: Any
) -> AsyncIterator[Plane]:
    async with open_plane(options=options, **fake) as plane:
        for plugin in plugins:
            models, by_name = ServedModels({"m": plane.model}), {"m": plugin("m")}
            plane.app = build_asgi_app(models, options, plugins=by_name)
            plane.http._transport.app = plane.app
        yield plane
