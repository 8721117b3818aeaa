"""What a protocol plug-in is: how requests of its form become prompts, and outputs its answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from starlette.requests import Request

from deployments.protocols.body import Body
from deployments.protocols.sampling import SamplingFields
from engine.output_processor import TextDelta
from engine.outputs import RequestOutput
from engine.sampling_params import SamplingParams

R = TypeVar("R", bound=Body)

Prompt = str | list[int] | list[dict[str, Any]]
"""A text, token ids, or the messages of a chat, which the model's chat template writes."""


@dataclass(frozen=True, slots=True)
class StreamFormat:
    """How the values of a streamed answer are written."""

    media_type: str
    before: bytes
    """Of each value, which is JSON without line breaks."""
    after: bytes
    end: bytes
    """Of the stream."""

    def frame(self, value: bytes) -> bytes:
        """What is written of one value."""
        return self.before + value + self.after


EVENT_STREAM = StreamFormat(
    "text/event-stream; charset=utf-8", b"data: ", b"\n\n", b"data: [DONE]\n\n"
)
"""Server-sent events, ended as OpenAI's are."""
JSON_LINES = StreamFormat("application/x-ndjson", b"", b"\n", b"")
"""A value a line."""


class ServingEngine(ABC, Generic[R]):
    """Serves a protocol of one's own, at a path of its own.

    A subclass sets `path` and `request_model` and overrides `create_prompt`; the rest has defaults.
    There is one instance for each model whose `class_name` names the class, in every ingress
    replica; instances serve many requests at once. Methods get the checked body; API keys, limits,
    failover, counting and the HTTP status of errors are the server's.

    A method that finds something wrong with a request raises `InvalidRequest`, whose sentence the
    client gets with status 400. Any other exception is a 500 that says nothing, and a line in the
    log without its message, which might quote the prompt. All errors but those from before the body
    was read (401, 408, 413 and the like) have the form of `create_error_response`.

    Args:
        model_name: under which the model is served.
    """

    path: ClassVar[str]
    """For POST, such as `/api/generate`; may have parameters: `/v2/models/{model}/infer`."""
    request_model: type[R]
    """The body of a request, a pydantic model."""
    stream_format: ClassVar[StreamFormat] = EVENT_STREAM

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name

    @abstractmethod
    def create_prompt(self, request: R, raw_request: Request) -> Prompt | Awaitable[Prompt]:
        """The prompt of a request.

        A plain method runs in one of a few threads of the plug-in, so that it may take its time
        without holding up other streams; `async def` runs in the event loop and must not block it.
        What comes back is tokenized, and checked against the model's length, by the server.

        Args:
            request: the checked body.
            raw_request: headers, path parameters and query. Its body has been read.

        Raises:
            InvalidRequest: the request cannot be served as it is.
        """

    def create_error_response(self, message: str, **kw: Any) -> Any:
        """The JSON value that tells of an error; here, OpenAI's error object.

        Args:
            message: a sentence for the client, which tells nothing of the inside.
            kw: `err_type` (`invalid_request_error`, `server_error`, …), `status_code` of the HTTP
                answer, and `code` and `param` (the offending field), which may be None.
        """
        error = {"type": kw["err_type"], "param": kw["param"], "code": kw["code"]}
        return {"error": {"message": message, **error}}

    def requested_model(self, request: R, raw_request: Request) -> str | None:
        """The model that a request names: the path parameter or else the field `model`.

        None will do where one model alone has this class. Asked of any instance of the class.
        """
        named: str | None = raw_request.path_params.get("model", getattr(request, "model", None))
        return named

    def sampling_params(self, request: R) -> SamplingParams:
        """How to sample; by the sampling fields of the body, if it has them."""
        if isinstance(request, SamplingFields):
            return request.sampling_params()
        return SamplingParams()

    def is_streamed(self, request: R) -> bool:
        """Whether the answer is streamed; by the field `stream`, if there is one."""
        return bool(getattr(request, "stream", False))

    def create_response(self, request: R, output: RequestOutput) -> Any:
        """The JSON value of an answer that is not streamed. Runs where `create_prompt` does."""
        first = output.outputs[0]
        return {"text": first.text, "finish_reason": first.finish_reason}

    def create_chunk(self, request: R, index: int, delta: TextDelta) -> Any:
        """The JSON value that tells of new text in a stream, or None for none; must be quick.

        Args:
            request: the checked body.
            index: of the completion, where `SamplingParams.n` asks for several.
            delta: what is new. The last of a completion has a `finish_reason`.
        """
        if not delta.text and delta.finish_reason is None:
            return None
        return {"text": delta.text, "index": index, "finish_reason": delta.finish_reason}

    def create_last_chunk(self, request: R, output: RequestOutput) -> Any:
        """The JSON value that a stream ends with, or None for none; must be quick."""
        return None
