"""Serves protocol plug-ins: their code decides on forms alone, and may fail without harm."""

from __future__ import annotations

import asyncio
import inspect
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar, cast

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp

from deployments.ingress.answers import EventStream, new_id, to_json
from deployments.ingress.errors import ApiError, json_response, server_error, to_api_error
from deployments.ingress.plugin_threads import TIME_LIMIT_S, PluginThreads
from deployments.ingress.prompts import chat_tokens
from deployments.ingress.served import Piece, ServedModel, ServedModels, build_jobs
from deployments.plugins.serving_engine import ServingEngine
from deployments.protocols.body import Body, read_body
from engine.errors import InvalidRequest
from engine.job import Job

logger = logging.getLogger("ray.serve")

T = TypeVar("T")
Plugin = ServingEngine[Any]


class PluggedProtocol:
    """Answers at the path of a plug-in.

    Args:
        models: all that are served.
        plugins: served name → plug-in, of the models with this protocol.
    """

    def __init__(self, models: ServedModels, plugins: Mapping[str, Plugin]) -> None:
        self._models = ServedModels({name: models.by_name[name] for name in plugins})
        self._plugins = plugins
        self._threads = PluginThreads()  # of its own: a slow protocol keeps no other waiting

    async def __call__(self, request: Request, data: bytes) -> ASGIApp:
        """Answer a request, in the plug-in's form whatever happens."""
        plugin = next(iter(self._plugins.values()))
        try:
            with _blaming(plugin):
                body = await read_body(plugin.request_model, data)
                name = plugin.requested_model(body, request)
            model = self._models.find(name)
            plugin = self._plugins[model.name]
            return await self._answer(plugin, model, body, request)
        except Exception as error:
            answer = to_api_error(error)
            return answer.response(_error_value(plugin, answer))

    async def _answer(
        self, plugin: Plugin, model: ServedModel, body: Body, request: Request
    ) -> ASGIApp:
        with _blaming(plugin):
            params = plugin.sampling_params(body)
            is_streamed = plugin.is_streamed(body)
        with model.admission(1, params, "prompt"):
            prompt = await self._prompt(plugin, model, body, request)
            (job,) = await build_jobs(model, new_id("plug"), [prompt], params)
        if is_streamed:
            return await _stream(plugin, model, body, job)
        await model.finish([job])
        return await self._aside(
            plugin, lambda: json_response(plugin.create_response(body, job.output()))
        )

    async def _prompt(
        self, plugin: Plugin, model: ServedModel, body: Body, request: Request
    ) -> str | list[int]:
        created = await self._aside(plugin, partial(plugin.create_prompt, body, request))
        with _blaming(plugin):
            prompt = (
                await asyncio.wait_for(created, TIME_LIMIT_S)
                if inspect.isawaitable(created)
                else created
            )
            if isinstance(prompt, str):
                return prompt
            kinds = set(map(type, prompt))
            if kinds not in ({int}, {dict}, set()):
                raise TypeError("create_prompt returned neither a text nor token ids nor messages.")
        if kinds == {dict}:
            return await chat_tokens(model, cast(list[dict[str, Any]], prompt), "prompt")
        return cast(list[int], prompt)

    async def _aside(self, plugin: Plugin, work: Callable[[], T]) -> T:
        """Do a plug-in's work in a thread.

        Raises:
            InvalidRequest, ApiError: see `_blaming`; 504 for work that does not end in time.
        """

        def blamed() -> T:  # there, as some exceptions may not be handed to another thread
            with _blaming(plugin):
                return work()

        try:
            return await self._threads.run(blamed)
        except TimeoutError:
            who = type(plugin).__name__
            logger.error("the plug-in %s has not ended in %.0f s, now or before", who, TIME_LIMIT_S)
            raise ApiError(
                504, "The server's code for this path takes too long.", "server_error"
            ) from None


async def _stream(plugin: Plugin, model: ServedModel, body: Body, job: Job) -> EventStream:
    form = plugin.stream_format

    def frame(create: Callable[[], Any]) -> bytes:
        with _blaming(plugin):
            value = create()
            return b"" if value is None else form.frame(to_json(value))

    def write(piece: Piece) -> bytes:
        return frame(lambda: plugin.create_chunk(body, piece.choice, piece.delta))

    def last() -> bytes:
        return frame(lambda: plugin.create_last_chunk(body, job.output()))

    def failed(error: Exception) -> bytes:
        return form.frame(_error_value(plugin, to_api_error(error)))

    batches = model.run([job])
    first = await anext(batches)
    stream = EventStream(first, batches, write, last, failed, form.end)
    stream.headers["content-type"] = form.media_type
    return stream


def _error_value(plugin: Plugin, error: ApiError) -> msgspec.Raw:
    """What a plug-in says of an error, as JSON; OpenAI's error object if it cannot."""
    try:
        with _blaming(plugin):
            value = plugin.create_error_response(
                error.message,
                err_type=error.kind,
                status_code=error.status,
                code=error.code,
                param=error.param,
            )
            return msgspec.Raw(to_json(value))
    except (ApiError, InvalidRequest):
        return msgspec.Raw(to_json(error.body()))


@contextmanager
def _blaming(plugin: Plugin) -> Iterator[None]:
    """Turn what a plug-in's code runs into into an answer that tells nothing of it.

    Raises:
        InvalidRequest: as raised within, like `ApiError`.
        ApiError: 500 for any other exception. The log gets its type and place, and not its
            message, which may quote the prompt.
    """
    try:
        yield
    except (InvalidRequest, ApiError):
        raise
    except (Exception, SystemExit) as error:  # an exit would end the whole ingress
        place = "".join(traceback.format_tb(error.__traceback__))
        who, what = type(plugin).__name__, type(error).__name__
        logger.error("the plug-in %s failed with %s:\n%s", who, what, place)
        raise server_error() from None
