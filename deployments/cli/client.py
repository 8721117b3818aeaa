"""A client of a server with OpenAI's API."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import aiohttp

from deployments.cli.errors import CommandError
from deployments.cli.terminal import printable

KEY_VARIABLE = "TRUNKLINE_API_KEY"
"""Variable of the environment that holds the API key to send."""
CONNECT_S = 10.0
LONGEST_LINE = 2**20
"""Bytes of the longest event of a stream."""


@dataclass(slots=True, frozen=True)
class Answer:
    """An HTTP answer."""

    status: int
    headers: Mapping[str, str]
    """Their names in lower case."""
    body: bytes


class Client:
    """Talks to one server; a context manager of the event loop that it belongs to.

    Args:
        url: of the server, with or without `/v1`.
    """

    def __init__(self, url: str) -> None:
        self.url = base_url(url)
        key = os.environ.get(KEY_VARIABLE)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
            connector=aiohttp.TCPConnector(limit=0),
            read_bufsize=LONGEST_LINE,
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._session.close()

    async def post(self, path: str, body: bytes) -> Answer:
        """Send a JSON body and wait for the whole answer.

        Raises:
            OSError: the server cannot be reached, or the connection broke.
        """
        headers = {"Content-Type": "application/json"}
        try:
            async with self._session.post(self.url + path, data=body, headers=headers) as response:
                lower = {name.lower(): value for name, value in response.headers.items()}
                return Answer(response.status, lower, await response.read())
        except aiohttp.ClientError as error:
            raise ConnectionError(str(error)) from error

    async def first_model(self) -> str:
        """The first model that is served.

        Raises:
            CommandError: there is no such server.
        """
        async with self._reaching(), self._session.get(f"{self.url}/v1/models") as response:
            data = await response.read()
            if response.status != 200:
                raise CommandError(describe(response.status, data))
            try:
                return str(json.loads(data)["data"][0]["id"])
            except (ValueError, LookupError, TypeError):
                raise CommandError(f"{self.url} does not speak OpenAI's API.") from None

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """The first choice of each event of a streamed answer; closing it ends the request.

        Raises:
            CommandError: the server is not there, refuses the request, or fails.
        """
        request = self._session.post(self.url + path, json={**body, "stream": True})
        async with self._reaching(), request as response:
            if response.status != 200:
                raise CommandError(describe(response.status, await response.read()))
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                data = line.removeprefix(b"data: ")
                event = json.loads(data)
                if "error" in event:
                    raise CommandError(f"the answer broke off: {error_message(data)}")
                for choice in event.get("choices") or ():
                    yield choice

    @asynccontextmanager
    async def _reaching(self) -> AsyncIterator[None]:
        """Turn what goes wrong on the way to the server into a sentence."""
        try:
            yield
        except aiohttp.ClientConnectorError:
            raise CommandError(
                f"nothing answers at {self.url}; start a server with `trunkline serve`, or name "
                "one with --url."
            ) from None
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            text = str(error) or type(error).__name__
            raise CommandError(f"the connection to {self.url} failed: {text}.") from None


def base_url(url: str) -> str:
    """The address of a server without its path.

    Raises:
        CommandError: it is not one of HTTP.
    """
    full = url if "://" in url else f"http://{url}"
    if not full.startswith(("http://", "https://")):
        raise CommandError(f"--url must begin with http:// or https://, got {url}.")
    return full.rstrip("/").removesuffix("/v1")


def error_message(body: bytes) -> str:
    """What an answer that is an error says, made fit for a terminal; empty where it says nothing in
    OpenAI's form."""
    try:
        return printable(str(json.loads(body)["error"]["message"] or ""))
    except (ValueError, LookupError, TypeError):
        return ""


def describe(status: int, body: bytes) -> str:
    """A sentence about an answer that is an error."""
    if status == 401:
        return f"the server asks for an API key; put yours into {KEY_VARIABLE}."
    message = error_message(body)
    return (
        f"the server answered {status}: {message}" if message else f"the server answered {status}."
    )
