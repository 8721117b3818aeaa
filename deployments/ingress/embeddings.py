"""`/v1/embeddings`."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from deployments.aside import run_aside
from deployments.ingress.answers import header, new_id, to_json, usage
from deployments.ingress.errors import json_response
from deployments.ingress.served import ServedModels, build_jobs
from deployments.protocols.body import read_body
from deployments.protocols.embeddings import EmbeddingsBody
from engine.embedding import POOLED_PARAMS, check_dimensions, to_embedding
from engine.job import Job

LONG_ANSWER = 16 * 1024
"""Answers of more numbers are written in a thread, so that other streams do not wait."""


async def handle_embeddings(models: ServedModels, request: Request, data: bytes) -> Response:
    """Answer with the embeddings of the inputs, in their order."""
    body = await read_body(EmbeddingsBody, data)
    model = models.find(body.model)
    check_dimensions(body.dimensions, model.hidden_size)
    answer_id = new_id("embd")
    inputs, keep_last = body.inputs(), body.num_kept(model.max_model_len)
    with model.admission(len(inputs), POOLED_PARAMS, "input"):
        jobs = await build_jobs(
            model,
            answer_id,
            inputs,
            POOLED_PARAMS,
            priority=body.priority,
            cache_salt=body.cache_salt,
            param="input",
            add_special_tokens=body.add_special_tokens,
            keep_last=keep_last,
            pooling=model.pooling,
        )
    await model.finish(jobs)
    begin = header(answer_id, "list", body.model)
    if len(jobs) * model.hidden_size > LONG_ANSWER:
        return await run_aside(lambda: _answer(body, jobs, begin))
    return _answer(body, jobs, begin)


def _answer(body: EmbeddingsBody, jobs: Sequence[Job], begin: dict[str, Any]) -> Response:
    found = [
        {"object": "embedding", "index": index, "embedding": _embedding(body, job)}
        for index, job in enumerate(jobs)
    ]
    return json_response({**begin, "data": found, "usage": usage(jobs)})


def _embedding(body: EmbeddingsBody, job: Job) -> str | msgspec.Raw:
    vector = to_embedding(job.pooled, body.dimensions, body.normalize)
    if body.encoding_format == "base64":
        return b64encode(vector.tobytes()).decode()
    return msgspec.Raw(to_json(vector.tolist()))  # each by itself: others may run between
