"""`/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from deployments.ingress.answers import (
    Chunks,
    EventStream,
    header,
    new_id,
    open_stream,
    usage,
)
from deployments.ingress.chat_writer import ChatWriter, MessageWriter, choice_logprobs
from deployments.ingress.message_style import MessageForm
from deployments.ingress.messages import whole_message
from deployments.ingress.prompts import chat_prompt
from deployments.ingress.served import ServedModel, ServedModels, build_jobs
from deployments.ingress.token_ids import TokenIdChunks
from deployments.ingress.whole_answers import answer_size, whole_answer
from deployments.protocols.body import read_body
from deployments.protocols.logprobs import prompt_logprobs
from deployments.protocols.openai import ChatBody
from deployments.protocols.reasoning import thinking_at_end, thinking_in_prompt
from deployments.protocols.sampling import check_room
from deployments.protocols.tool_calls import ToolUse
from engine.job import Job
from engine.outputs import CompletionOutput
from engine.sampling_params import SamplingParams


async def handle_chat(
    models: ServedModels, request: Request, data: bytes
) -> Response | EventStream:
    """Answer a chat, streamed or whole."""
    body = await read_body(ChatBody, data)
    model = models.find(body.model)
    tool_use = body.tool_use()
    params = model.style.params(body.to_params(), tool_use)
    body.check_stream_options()
    body.check_template_options(model.allow_request_chat_templates)
    answer_id = new_id("chatcmpl")
    with model.admission(1, params, "messages"):
        remember = body.cache_salt is None
        prompt = await chat_prompt(
            model, body, body.messages, tool_use, len(data), remember=remember
        )
        jobs = await build_jobs(
            model,
            answer_id,
            [prompt.token_ids],
            params,
            priority=body.priority,
            cache_salt=body.cache_salt,
            param="messages",
            keep_last=body.num_kept(model.max_model_len, params),
        )
        lengths = (len(job.prompt_token_ids) for job in jobs)
        check_room(lengths, model.max_model_len, body.output_limit())
        form = _form(model, body, tool_use, params, prompt.text)
    if body.stream:
        begin = header(answer_id, "chat.completion.chunk", body.model)
        return await _stream(model, body, jobs, begin, form)
    await model.finish(jobs)
    begin = header(answer_id, "chat.completion", body.model)
    return await _whole(model, body, jobs[0], begin, form)


def _form(
    model: ServedModel,
    body: ChatBody,
    tool_use: ToolUse | None,
    params: SamplingParams,
    prompt: str,
) -> MessageForm | None:
    """How to read the answer. One that is held to a form has no room for thinking."""
    if params.structured_outputs is not None:
        return model.style.form(tool_use, None, may_think=False)
    tells = body.include_reasoning is not False
    return model.style.form(tool_use, _thinking(body, prompt), tells_reasoning=tells)


async def _stream(
    model: ServedModel,
    body: ChatBody,
    jobs: Sequence[Job],
    begin: dict[str, Any],
    form: MessageForm | None,
) -> EventStream:
    telling = TokenIdChunks(body, jobs, begin, in_choice=False) if body.return_token_ids else None
    chunks = telling or Chunks(body, jobs, begin)
    writer = (
        ChatWriter(model, body, chunks)
        if form is None
        else MessageWriter(model, body, chunks, form)
    )
    return await open_stream(model.run(jobs), chunks.noting(writer.write), chunks.last)


def _thinking(body: ChatBody, prompt: str) -> bool | None:
    """What the prompt says of thinking; an answer to be continued is itself asked."""
    if not body.continue_final_message:
        return thinking_in_prompt(prompt)
    content = body.messages[-1].get("content")
    return thinking_at_end(content) if isinstance(content, str) else None


async def _whole(
    model: ServedModel,
    body: ChatBody,
    job: Job,
    begin: dict[str, Any],
    form: MessageForm | None,
) -> Response:
    """An answer that has ended."""
    outputs = [processor.result() for processor in job.processors.values()]

    def build() -> dict[str, Any]:
        told: dict[str, Any] = {
            **begin,
            "choices": [_choice(model, body, output, form) for output in outputs],
            "usage": usage([job]),
        }
        if body.return_token_ids:
            told["prompt_token_ids"] = job.prompt_token_ids
        if body.prompt_logprobs is not None:
            entries = job.output().prompt_logprobs
            told["prompt_logprobs"] = prompt_logprobs(entries, body.prompt_logprobs)
        return told

    size = answer_size([job], bool(body.return_token_ids))
    if form is not None:
        size += sum(len(output.text) for output in outputs)
    return await whole_answer(size, build, ("choices", "logprobs"))


def _choice(
    model: ServedModel, body: ChatBody, output: CompletionOutput, form: MessageForm | None
) -> dict[str, Any]:
    message: dict[str, Any] = {"role": model.style.role, "content": output.text}
    reason: str | None = output.finish_reason
    if form is not None:
        told, reason = whole_message(form, output)
        message |= told
    logprobs = None
    if output.logprobs is not None:
        logprobs = {"content": choice_logprobs(model, body, output.logprobs)}
    choice = {
        "index": output.index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": reason,
        "stop_reason": output.stop_reason,
    }
    if body.return_token_ids:
        choice["token_ids"] = output.token_ids
    return choice
