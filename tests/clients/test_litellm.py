"""LiteLLM's adapter for servers that speak OpenAI's API."""

from __future__ import annotations

import json
from typing import Any

import litellm
import pytest
from forms import INVENT, QUESTION, WEATHER, Person, Weather


@pytest.fixture
def options(server) -> dict[str, Any]:
    return {
        "model": f"openai/{server.model}",
        "api_base": server.base_url,
        "api_key": server.key,
        "messages": QUESTION,
        "temperature": 0,
        "max_tokens": 12,
        "num_retries": 0,
    }


def test_completion(options):
    answer = litellm.completion(**options)
    assert "Paris" in answer.choices[0].message.content
    assert answer.usage.completion_tokens > 0


def test_stream(options):
    chunks = list(litellm.completion(**options, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == litellm.completion(**options).choices[0].message.content


async def test_acompletion(options):
    answer = await litellm.acompletion(**options)
    stream = await litellm.acompletion(**options, stream=True)
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == answer.choices[0].message.content


def test_text_completion(options):
    given = {**options, "model": f"text-completion-openai/{options['model'].partition('/')[2]}"}
    del given["messages"]
    assert litellm.text_completion(**given, prompt="One two").choices[0].text


def test_tools(options):
    given = {**options, "tools": [WEATHER], "tool_choice": "required", "max_tokens": 200}
    call = litellm.completion(**given).choices[0].message.tool_calls[0]
    assert call.function.name == "Weather"
    Weather.model_validate(json.loads(call.function.arguments))


def test_response_format(options):
    given = {**options, "messages": INVENT, "response_format": Person, "max_tokens": 200}
    Person.model_validate_json(litellm.completion(**given).choices[0].message.content)


def test_errors(options, server):
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**{**options, "temperature": -1})
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**{**options, "model": "openai/none"})
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**{**options, "api_key": "wrong"})
    with pytest.raises(litellm.RateLimitError):
        for _ in range(2):
            litellm.completion(**{**options, "api_key": server.limited_key})
