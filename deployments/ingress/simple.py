"""`/generate`, `/generate_stream` and `/batch_generate`: prompts in, texts out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from deployments.ingress.answers import EventStream, event, new_id, open_stream, usage
from deployments.ingress.errors import json_response
from deployments.ingress.prompts import chat_tokens
from deployments.ingress.served import Piece, ServedModel, ServedModels, build_jobs
from deployments.protocols.body import read_body
from deployments.protocols.sampling import check_room
from deployments.protocols.simple import BatchGenerateBody, GenerateBody, SimpleFields
from engine.job import Job


async def handle_generate(
    models: ServedModels, request: Request, data: bytes
) -> Response | EventStream:
    """Answer with the text of one prompt, whole unless the request says `stream`."""
    body = await read_body(GenerateBody, data)
    model, jobs = await _jobs(models, body, [body.prompt], "prompt", body.messages())
    if body.stream:
        return await _stream(model, jobs)
    await model.finish(jobs)
    return json_response({**_result(jobs[0]), "prompt": body.prompt})


async def handle_generate_stream(
    models: ServedModels, request: Request, data: bytes
) -> EventStream:
    """Stream the text of one prompt as events `{"text": …, "index": …, "finish_reason": …}`."""
    body = await read_body(GenerateBody, data)
    return await _stream(*await _jobs(models, body, [body.prompt], "prompt", body.messages()))


async def handle_batch_generate(models: ServedModels, request: Request, data: bytes) -> Response:
    """Answer with the texts of many prompts, in their order."""
    body = await read_body(BatchGenerateBody, data)
    model, jobs = await _jobs(models, body, body.checked_prompts(), "prompts")
    await model.finish(jobs)
    results = [_result(job) for job in jobs]
    texts = [result["text"] for result in results]
    return json_response({"texts": texts, "results": results, "usage": usage(jobs)})


async def _stream(model: ServedModel, jobs: Sequence[Job]) -> EventStream:
    def last() -> bytes:
        return event({"text": "", "finished": True, "usage": usage(jobs)})

    return await open_stream(model.run(jobs), _write, last)


async def _jobs(
    models: ServedModels,
    body: SimpleFields,
    prompts: Sequence[str | list[int]],
    param: str,
    messages: Sequence[dict[str, Any]] | None = None,
) -> tuple[ServedModel, list[Job]]:
    """What the prompts run as, or the messages, if there are any, in place of the only prompt."""
    model = models.find(body.model)
    params = body.to_params()
    with model.admission(len(prompts), params, param):
        if messages is not None:
            prompts = [await chat_tokens(model, messages, param)]
        jobs = await build_jobs(
            model, new_id("gen"), prompts, params, priority=body.priority, param=param
        )
        lengths = (len(job.prompt_token_ids) for job in jobs)
        check_room(lengths, model.max_model_len, ("max_tokens", body.max_tokens))
    return model, jobs


def _result(job: Job) -> dict[str, Any]:
    outputs = job.output().outputs
    result: dict[str, Any] = {
        "prompt": job.prompt,
        "text": outputs[0].text,
        "finish_reason": outputs[0].finish_reason,
        "usage": usage([job]),
    }
    if len(outputs) > 1:
        result["texts"] = [output.text for output in outputs]
    return result


def _write(piece: Piece) -> bytes:
    delta = piece.delta
    if not delta.text and delta.finish_reason is None:
        return b""
    return event({"text": delta.text, "index": piece.choice, "finish_reason": delta.finish_reason})
