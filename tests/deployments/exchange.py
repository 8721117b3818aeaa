"""Talks to an ASGI application message by message."""

from __future__ import annotations

import asyncio
import json
from typing import Any


class Exchange:
    """One request, given to the application message by message."""

    def __init__(
        self,
        app: Any,
        headers: dict[str, str],
        path: str = "/v1/completions",
        method: str = "POST",
    ) -> None:
        self._messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.num_received = 0
        self.sent: list[dict[str, Any]] = []
        self.may_send = asyncio.Event()
        """Cleared, it holds up what comes after the first message."""
        self.may_send.set()
        encoded = [(k.lower().encode(), v.encode()) for k, v in headers.items()]
        scope = {"type": "http", "method": method, "path": path, "query_string": b""}
        scope |= {"headers": encoded, "root_path": "", "http_version": "1.1", "scheme": "http"}
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        self.num_received += 1
        return await self._messages.get()

    async def _send(self, message: dict[str, Any]) -> None:
        if self.sent:
            await self.may_send.wait()
        self.sent.append(message)

    def feed(self, body: bytes, more: bool) -> None:
        self._messages.put_nowait({"type": "http.request", "body": body, "more_body": more})

    def leave(self) -> None:
        self._messages.put_nowait({"type": "http.disconnect"})

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def headers(self) -> dict[str, str]:
        return {k.decode(): v.decode() for k, v in self.sent[0]["headers"]}

    @property
    def code(self) -> str:
        return json.loads(b"".join(m["body"] for m in self.sent[1:]))["error"]["code"]
