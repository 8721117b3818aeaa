"""`/tokenize` and `/detokenize`."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from deployments.ingress.errors import json_response
from deployments.ingress.prompts import chat_prompt, tokenize
from deployments.ingress.served import ServedModel, ServedModels, aside
from deployments.ingress.whole_answers import IDS_PER_LOGPROB, whole_answer
from deployments.protocols.body import read_body
from deployments.protocols.tokenize import DetokenizeBody, TokenizeBody


async def handle_tokenize(models: ServedModels, request: Request, data: bytes) -> Response:
    """Answer with the tokens that a prompt or a chat has."""
    body = await read_body(TokenizeBody, data)
    model = models.find(body.model)
    tokens = await _tokens(model, body, len(data))
    tokenizer = model.need_tokenizer("return_token_strs") if body.return_token_strs else None

    def build() -> dict[str, Any]:
        return {
            "count": len(tokens),
            "max_model_len": model.max_model_len,
            "tokens": tokens,
            "token_strs": None if tokenizer is None else map(tokenizer.spelling, tokens),
        }

    size = len(tokens) // IDS_PER_LOGPROB if tokenizer is None else len(tokens)
    return await whole_answer(size, build)


async def handle_detokenize(models: ServedModels, request: Request, data: bytes) -> Response:
    """Answer with the text of tokens, special ones included."""
    body = await read_body(DetokenizeBody, data)
    model = models.find(body.model)
    tokenizer = model.need_tokenizer("tokens")
    body.check(model.vocab_size)
    text = await aside(len(body.tokens), lambda: tokenizer.decode(body.tokens, False))
    return json_response({"prompt": text})


async def _tokens(model: ServedModel, body: TokenizeBody, body_length: int) -> list[int]:
    tool_use = body.check()
    body.check_template_options(model.allow_request_chat_templates)
    if body.messages is not None:
        chat = await chat_prompt(model, body, body.messages, tool_use, body_length)
        if not body.add_special_tokens:
            return chat.token_ids
        return await tokenize(model, chat.text, "messages")
    prompt = body.prompt or ""
    model.check_length(prompt, "prompt")
    return await tokenize(model, prompt, "prompt", body.add_special_tokens is not False)
