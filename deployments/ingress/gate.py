"""Who may come in, and how often: what is decided before a request's body is read."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from ipaddress import ip_address

from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.api_keys import ApiKey, KeySource
from deployments.ingress.errors import ApiError
from deployments.ingress.request_counts import AnswerCounts
from engine.errors import InvalidRequest

OPEN_PATHS = frozenset(("/health", "/ready", "/ping"))
"""What load balancers and Kubernetes ask, without a key."""
MAX_HEADERS = 100
MAX_HEADER_BYTES = 32 * 1024
"""Of path, query and all headers together. (HAProxy takes 101 headers and 15 KiB.)"""


def path_in_app(scope: Scope) -> str:
    """The path of a request without the prefix under which Serve runs the application."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


class KeyUse:
    """What a key does in this process; a context manager around each of its requests."""

    __slots__ = ("_filled_at", "_missing", "key", "limit", "running")

    def __init__(self) -> None:
        self.key: ApiKey | None = None
        """As it was found last; None for requests without."""
        self.limit: int | None = None
        """Most that may be under way."""
        self.running = 0
        """Completions under way; a request counts as one until it says that it wants more."""
        self._missing = 0.0
        self._filled_at = -math.inf

    @property
    def owner(self) -> bytes:
        """Tells whom what is kept of an answer belongs to: nobody else may learn of it."""
        return b"" if self.key is None else self.key.digest

    def __enter__(self) -> None:
        self.running += 1

    def __exit__(self, *_: object) -> None:
        self.running -= 1

    @contextmanager
    def hold(self, num_completions: int, param: str) -> Iterator[None]:
        """Count all completions of a request, which counts as one already.

        Args:
            num_completions: of the request.
            param: the field that asks for them.

        Raises:
            InvalidRequest: they alone are more than the key may have.
            ApiError: 429, the key has too many now.
        """
        if self.limit is not None and num_completions > self.limit:
            raise InvalidRequest(
                f"the request asks for {num_completions} completions, but its API key may have "
                f"{self.limit} at a time; ask for fewer.",
                param,
            )
        self.check_room(num_completions - 1)
        self.running += num_completions - 1
        try:
            yield
        finally:
            self.running -= num_completions - 1

    def check_room(self, count: int) -> None:
        """Check that so many more completions may be under way.

        Raises:
            ApiError: 429, they may not.
        """
        if self.key is not None and self.limit is not None and self.running + count > self.limit:
            raise _too_many(self.key, f"may have {self.limit} completions under way at once", 1)

    def take_token(self, per_minute: float, now: float) -> float:
        """Take a token from a bucket that has room for those of a minute.

        Args:
            per_minute: tokens that come into the bucket in a minute.
            now: time in seconds.

        Returns:
            0, or when there is no token, the seconds until there is one.
        """
        come = (now - self._filled_at) * per_minute / 60
        missing = max(0.0, self._missing - come) + 1
        room = max(1.0, per_minute)
        if missing > room:
            return (missing - room) * 60 / per_minute
        self._missing, self._filled_at = missing, now
        return 0.0


class KeyLimits:
    """What each key may do in this process, where it has no limits of its own.

    Args:
        max_concurrent_requests: completions under way at once; None sets no limit.
        requests_per_minute: that may begin; None sets no limit.
        now: clock, in seconds.
    """

    def __init__(
        self,
        max_concurrent_requests: int | None = None,
        requests_per_minute: float | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_concurrent = max_concurrent_requests
        self._per_minute = requests_per_minute
        self._now = now
        self._uses: dict[bytes, KeyUse] = {}

    def admit(self, key: ApiKey) -> KeyUse:
        """Let a request of the key begin, which is to run inside of what this returns.

        Raises:
            ApiError: 429, the key has too many.
        """
        use = self._uses.get(key.digest)
        if use is None:
            use = self._uses[key.digest] = KeyUse()
        own = key.max_concurrent_requests
        use.key, use.limit = key, self._max_concurrent if own is None else own
        use.check_room(1)
        rate = self._per_minute if key.requests_per_minute is None else key.requests_per_minute
        if rate is not None and (wait := use.take_token(rate, self._now())) > 0:
            raise _too_many(key, f"has had its {rate:g} requests a minute", math.ceil(wait))
        return use


class Gate:
    """ASGI middleware that refuses requests by their headers alone, with OpenAI's error object.

    Args:
        app: what is behind it.
        source: of the keys; None lets everybody in.
        limits: of each key.
        hosts: names by which requests may call the server, besides those of the loopback; None lets
            them use any.
        answers: where refusals are counted.
    """

    def __init__(
        self,
        app: ASGIApp,
        source: KeySource | None,
        limits: KeyLimits,
        hosts: Collection[str] | None,
        answers: AnswerCounts,
    ) -> None:
        self._app = app
        self._answers = answers
        self._source = source
        self._limits = limits
        self._hosts = hosts
        self._anybody = KeyUse()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http":  # no route takes it
            await self._app(scope, receive, send)
            return
        try:
            use = self._admit(scope)
        except ApiError as error:
            self._answers.refuse(error)
            response = error.response()
            if _may_be_long(scope):  # or the HTTP server would take in all of it
                response.headers["Connection"] = "close"
            await response(scope, receive, send)
            return
        scope["key_use"] = use
        with use:
            await self._app(scope, receive, send)

    def _admit(self, scope: Scope) -> KeyUse:
        authorization, host = _read_headers(scope)
        self._check_host(host)
        if self._source is None:
            return self._anybody
        if path_in_app(scope) in OPEN_PATHS:
            return self._anybody
        scheme, _, token = authorization.partition(b" ")
        if scheme.lower() != b"bearer" or not token.strip():
            raise _unauthorized("Send an API key in the header 'Authorization: Bearer KEY'.")
        key = self._source.find(token.strip())
        if key is None:
            # LiteLLM knows by these first words that it is not the request that is wrong.
            raise _unauthorized("Incorrect API key provided: it is not one of this server's.")
        return self._limits.admit(key)

    def _check_host(self, header: bytes) -> None:
        """Refuse a browser that took the server for another: a page whose name leads to its
        visitor's loopback may read what comes from there (DNS rebinding), but the name shows.

        Raises:
            ApiError: 403.
        """
        if self._hosts is None or not header:  # browsers always send one
            return
        name = re.sub(r":\d*$", "", header.decode("latin-1")).lower()
        if not is_loopback(name) and name not in self._hosts:
            raise ApiError(
                403,
                f"This server asks for no API key, and so must be called localhost or 127.0.0.1, "
                f"not '{name[:200]}': set API keys, or add the name to ingress.allowed_hosts.",
                "invalid_request_error",
                code="host_not_allowed",
            )


def is_loopback(host: str) -> bool:
    """Whether a host, as an option or in an address, is one that a machine calls itself."""
    try:
        return host == "localhost" or ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _read_headers(scope: Scope) -> tuple[bytes, bytes]:
    """The values of `Authorization` and `Host`, empty where there is none.

    Raises:
        ApiError: 431, the headers are too many or too long.
    """
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    size, authorization, host = len(scope["path"]) + len(scope["query_string"]), b"", b""
    for name, value in headers:
        size += len(name) + len(value)
        if name == b"authorization":
            authorization = value
        elif name == b"host":
            host = value
    if size > MAX_HEADER_BYTES or len(headers) > MAX_HEADERS:
        raise ApiError(
            431,
            f"A request may have {MAX_HEADERS} headers, and {MAX_HEADER_BYTES} bytes in them and "
            "its address; send less.",
            "invalid_request_error",
            code="headers_too_large",
        )
    return authorization, host


def _may_be_long(scope: Scope) -> bool:
    """Whether a body follows that does not say it is short."""
    headers = dict(scope["headers"])
    length = headers.get(b"content-length", b"0")
    return b"transfer-encoding" in headers or len(length) > 5


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, "invalid_request_error", code="invalid_api_key")


def _too_many(key: ApiKey, what: str, wait_s: int) -> ApiError:
    who = f"The API key of '{key.name}'" if key.name else "This API key"
    return ApiError(
        429,
        f"{who} {what}; try again later.",
        "rate_limit_error",
        code="rate_limit_exceeded",
        retry_after_s=wait_s,
    )
