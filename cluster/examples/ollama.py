"""A protocol plug-in: Ollama's `/api/generate`, as far as text goes.

In `serve_config.yaml`: `class_name: OllamaGenerate` at a model, and in `ingress`
`allowed_classes: [cluster.examples.ollama:OllamaGenerate]`.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from starlette.requests import Request

from deployments.plugins import (
    JSON_LINES,
    Body,
    Prompt,
    RequestOutput,
    SamplingParams,
    ServingEngine,
    TextDelta,
)

NAMES = {"num_predict": "max_tokens", "repeat_penalty": "repetition_penalty"}
"""Ollama's names of options that are called otherwise here."""
OPTIONS = {*NAMES, "temperature", "top_k", "top_p", "min_p", "seed", "stop"}


class OllamaBody(Body):
    """A request."""

    model: str
    prompt: str
    system: str | None = None
    raw: bool = False
    stream: bool = True
    options: dict[str, Any] = Field(default_factory=dict)


class OllamaGenerate(ServingEngine[OllamaBody]):
    """`POST /api/generate`: a line of JSON for each piece of text, or one for all."""

    path = "/api/generate"
    request_model = OllamaBody
    stream_format = JSON_LINES

    def create_prompt(self, request: OllamaBody, raw_request: Request) -> Prompt:
        """The prompt as a turn of a chat, unless it is to be taken as it is."""
        if request.raw:
            return request.prompt
        system = [{"role": "system", "content": request.system}] if request.system else []
        return [*system, {"role": "user", "content": request.prompt}]

    def sampling_params(self, request: OllamaBody) -> SamplingParams:
        """Those of `options` that mean something here."""
        given = {NAMES.get(k, k): v for k, v in request.options.items() if k in OPTIONS}
        return SamplingParams(**{"max_tokens": 128, **given})

    def create_response(self, request: OllamaBody, output: RequestOutput) -> Any:
        """The whole text, with the counts."""
        return {**self.create_last_chunk(request, output), "response": output.outputs[0].text}

    def create_chunk(self, request: OllamaBody, index: int, delta: TextDelta) -> Any:
        """A piece of text."""
        return {"model": self.model_name, "response": delta.text, "done": False}

    def create_last_chunk(self, request: OllamaBody, output: RequestOutput) -> Any:
        """How it ended, and the counts."""
        first = output.outputs[0]
        counts = {"prompt_eval_count": len(output.prompt_token_ids or ())}
        counts["eval_count"] = len(first.token_ids)
        ended = {"response": "", "done": True, "done_reason": first.finish_reason}
        return {"model": self.model_name, **ended, **counts}

    def create_error_response(self, message: str, **kw: Any) -> Any:
        """Ollama's form of an error."""
        return {"error": message}
