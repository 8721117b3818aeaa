"""`/tokenize` and `/detokenize`."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from deployments.ingress.errors import json_response
from deployments.ingress.prompts import chat_prompt, tokenize
from deployments.ingress.served import ServedModel, ServedModels, aside
from deployments.protocols.body import read_body
from deployments.protocols.tokenize import DetokenizeBody, TokenizeBody


async def handle_tokenize(models: ServedModels, request: Request, data: bytes) -> Response:
    """Answer with the tokens that a prompt or a chat has."""
    body = await read_body(TokenizeBody, data)
    model = models.find(body.model)
    tokens = await _tokens(model, body, len(data))
    answer: dict[str, Any] = {
        "count": len(tokens),
        "max_model_len": model.max_model_len,
        "tokens": tokens,
        "token_strs": None,
    }
    if body.return_token_strs:
        tokenizer = model.need_tokenizer("return_token_strs")
        answer["token_strs"] = list(map(tokenizer.spelling, tokens))
    return json_response(answer)


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
