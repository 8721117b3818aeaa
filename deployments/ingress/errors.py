"""Error answers in OpenAI's form: never a stack trace, never a path."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

import msgspec
import ray
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from deployments.ingress.request_record import current_record
from engine.errors import EngineDead, InvalidRequest

logger = logging.getLogger("ray.serve")


class ApiError(Exception):
    """An answer other than success.

    Attributes:
        status: HTTP status.
        message: a sentence for the client.
        kind: OpenAI's `type`.
        code: OpenAI's `code`.
        param: the offending field.
        retry_after_s: seconds after which another try makes sense.
        reason: what metrics count it under; by default `code`, or `kind` where there is none.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        self.reason = reason or code or kind

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self, body: Any = None) -> Response:
        """The HTTP answer, with OpenAI's error object unless another body is given."""
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        if self.retry_after_s:
            headers["Retry-After"] = str(self.retry_after_s)
        return json_response(self.body() if body is None else body, self.status, headers)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON answer."""
    return Response(msgspec.json.encode(value), status, headers, "application/json")


def invalid(error: InvalidRequest) -> ApiError:
    """The answer to a request that cannot be served as it is."""
    message = error.message
    is_word = message.partition(" ")[0].isalpha()  # and not a field such as `tool_calls`
    if is_word and not (error.param and message.lower().startswith(error.param)):
        message = message[:1].upper() + message[1:]
    return ApiError(400, message, "invalid_request_error", param=error.param)


def model_not_found(name: str, served: list[str]) -> ApiError:
    """The answer to a model that is not served."""
    return ApiError(
        404,
        f"The model '{name[:200]}' does not exist; served here: {', '.join(served)}.",
        "invalid_request_error",
        code="model_not_found",
        param="model",
    )


def unavailable(message: str, retry_after_s: int, reason: str = "no_engine") -> ApiError:
    """The answer when no engine can take a request now."""
    return ApiError(
        503,
        message,
        "service_unavailable",
        code="engine_unavailable",
        retry_after_s=retry_after_s,
        reason=reason,
    )


def overloaded(retry_after_s: int, reason: str = "too_many_requests") -> ApiError:
    """The answer when this server holds as many requests as it takes, or as much for them."""
    return ApiError(
        429,
        "The server has as many requests as it takes; try again later.",
        "rate_limit_error",
        code="server_overloaded",
        retry_after_s=retry_after_s,
        reason=reason,
    )


def server_error() -> ApiError:
    """The answer when the program is at fault."""
    return ApiError(500, "The server failed to handle the request.", "server_error")


def to_api_error(error: BaseException, retry_after_s: int = 1) -> ApiError:
    """The answer to an exception, noted in the request's record; unexpected ones are logged and say
    nothing of the inside."""
    match error:
        case ApiError():
            answer = error
        case InvalidRequest():
            answer = invalid(error)
        case EngineDead():
            told = "The engine of the request was lost; try again."
            answer = unavailable(told, retry_after_s, "engine_lost")
            answer.code = "engine_lost"  # unlike a request that was never admitted
        case BackPressureError():
            told = "All engines are busy; try again later."
            answer = unavailable(told, retry_after_s, "queue_full")
        case ray.exceptions.RayActorError() | RayServeException():
            answer = unavailable("No engine could take the request; try again.", retry_after_s)
        case HTTPException():
            answer = _from_http(error)
        case _:
            logger.error("unexpected error while handling a request", exc_info=error)
            answer = server_error()
    current_record().failure = answer
    return answer


async def handle_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's hook for unknown routes and wrong methods."""
    api_error = to_api_error(error)
    if api_error.status == HTTPStatus.NOT_FOUND:
        api_error.message = f"There is no {request.method} {request.url.path[:200]} here."
    response = api_error.response()
    if isinstance(error, HTTPException):
        response.headers.update(error.headers or {})
    return response


def _from_http(error: HTTPException) -> ApiError:
    status = HTTPStatus(error.status_code)
    return ApiError(status, f"{status.phrase}.", "invalid_request_error", code=status.name.lower())
