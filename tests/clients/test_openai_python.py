"""The `openai` package, as its users use it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from forms import INVENT, QUESTION, WEATHER, Person, Weather

LONG: dict[str, Any] = {"prompt": "Tell a story.", "max_tokens": 3000}
LONG["extra_body"] = {"ignore_eos": True}


@pytest.fixture
def client(server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.base_url, api_key=server.key, max_retries=0) as opened:
        yield opened


@pytest.fixture
def chat(client, server) -> Any:
    def ask(**options: Any) -> Any:
        given = {"model": server.model, "messages": QUESTION, "temperature": 0, "max_tokens": 12}
        return client.chat.completions.create(**given | options)

    return ask


@pytest.fixture
def complete(client, server) -> Any:
    def ask(**options: Any) -> Any:
        given = {"model": server.model, "prompt": "One two", "temperature": 0, "max_tokens": 8}
        return client.completions.create(**given | options)

    return ask


def test_models(client, server):
    assert [model.id for model in client.models.list()] == [server.model]
    model = client.models.retrieve(server.model)
    assert (model.id, model.object) == (server.model, "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("none")


def test_completions(complete):
    answer = complete(n=2, temperature=1.0, seed=3, logprobs=2, user="u")
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.finish_reason == "length"
        assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == 8
        assert "".join(choice.logprobs.tokens) == choice.text
    assert answer.usage.completion_tokens == 16
    answer = complete(prompt=["One", "Two"])
    assert len(answer.choices) == 2
    answer = complete(prompt=[3, 4, 5], echo=True)
    assert answer.usage.prompt_tokens == 3


def test_streamed_completions(complete):
    text = complete().choices[0].text
    parts = list(complete(stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].text for part in parts if part.choices) == text
    assert parts[-1].usage.completion_tokens == 8


def test_stop(complete):
    text = complete(max_tokens=20).choices[0].text
    stop = text[4:7]
    cut = complete(max_tokens=20, stop=[stop]).choices[0]
    assert (cut.text, cut.finish_reason) == (text[: text.index(stop)], "stop")


def test_chat(chat):
    answer = chat()
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].message.role == "assistant"
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens >= 0
    parts = [{"type": "text", "text": QUESTION[0]["content"]}]
    roles = [{"role": "user", "content": parts}]
    assert chat(messages=roles).choices[0].message.content == answer.choices[0].message.content


def test_streamed_chat(chat):
    whole = chat().choices[0].message.content
    chunks = list(chat(stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == whole
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_chat_logprobs_and_choices(chat):
    answer = chat(n=2, logprobs=True, top_logprobs=3, temperature=1.0)
    for choice in answer.choices:
        tokens = choice.logprobs.content
        assert "".join(token.token for token in tokens).startswith(choice.message.content)
        assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in tokens)
        assert all(bytes(token.bytes).decode() == token.token for token in tokens)
    chunks = list(chat(logprobs=True, stream=True))
    assert any(chunk.choices[0].logprobs for chunk in chunks)


def test_the_stream_helper(client, server):
    options = {"model": server.model, "messages": QUESTION, "temperature": 0, "max_tokens": 12}
    with client.chat.completions.stream(**options) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert "Paris" in final.choices[0].message.content


def test_parse(client, server):
    options: dict[str, Any] = {"model": server.model, "messages": INVENT, "seed": 1}
    options |= {"response_format": Person}
    answer = client.chat.completions.parse(**options)
    assert isinstance(answer.choices[0].message.parsed, Person)
    with client.chat.completions.stream(**options) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == answer.choices[0].message.parsed


def test_json_mode(chat):
    answer = chat(messages=INVENT, response_format={"type": "json_object"}, max_tokens=64)
    assert answer.choices[0].message.content.lstrip().startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "Weather"}}]
)
def test_tools(chat, choice):
    options = {"tools": [WEATHER], "tool_choice": choice, "max_tokens": 200}
    options |= {"parallel_tool_calls": False}
    (answer,) = chat(**options).choices
    (call,) = answer.message.tool_calls
    assert (call.type, call.function.name) == ("function", "Weather")
    Weather.model_validate_json(call.function.arguments)
    assert answer.finish_reason == ("tool_calls" if choice == "required" else "stop")

    arguments, names, ids = "", [], []
    for chunk in chat(**options, stream=True):
        for delta in chunk.choices[0].delta.tool_calls or ():
            assert delta.index == 0
            names += [delta.function.name] if delta.function.name else []
            ids += [delta.id] if delta.id else []
            arguments += delta.function.arguments or ""
    assert names == ["Weather"] and len(ids) == 1
    assert json.loads(arguments) == json.loads(call.function.arguments)

    result = {"role": "tool", "tool_call_id": call.id, "content": "Sunny."}
    said = [*QUESTION, answer.message.model_dump(exclude_none=True), result]
    assert chat(messages=said, tools=[WEATHER]).choices[0].message.role == "assistant"


def test_parsed_tools(client, server):
    tool = openai.pydantic_function_tool(Weather)
    answer = client.chat.completions.parse(
        model=server.model,
        messages=QUESTION,
        tools=[tool],
        tool_choice="required",
        temperature=0,
        parallel_tool_calls=False,
    )
    (call,) = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather)


def test_errors_are_of_the_right_class(client, server, chat):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(temperature=-1)
    assert (caught.value.param, caught.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as caught:
        chat(messages=[])
    assert caught.value.param == "messages"
    with pytest.raises(openai.NotFoundError) as missing:
        chat(model="none")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.BadRequestError):
        chat(temperature=-1, stream=True)
    limited = client.with_options(api_key=server.limited_key)
    with pytest.raises(openai.RateLimitError) as refused:
        for _ in range(2):
            limited.completions.create(model=server.model, prompt="a", max_tokens=1)
    assert int(refused.value.response.headers["retry-after"]) > 0


def test_raw_responses(client, server):
    options = {"model": server.model, "messages": QUESTION, "max_tokens": 2}
    raw = client.chat.completions.with_raw_response.create(**options)
    assert raw.status_code == 200 and raw.headers["content-type"] == "application/json"
    assert raw.parse().usage.completion_tokens == 2
    with client.chat.completions.with_streaming_response.create(**options) as response:
        assert json.loads(b"".join(response.iter_bytes()))["object"] == "chat.completion"


def test_a_timeout_leaves_nothing_behind(client, server):
    impatient = client.with_options(timeout=0.5)
    with pytest.raises(openai.APITimeoutError):
        impatient.completions.create(model=server.model, **LONG)
    server.wait_for(0)


def test_a_closed_stream_leaves_nothing_behind(client, server):
    stream = client.completions.create(model=server.model, stream=True, **LONG)
    next(iter(stream))
    stream.close()
    server.wait_for(0)


async def test_the_async_client(server):
    options = {"model": server.model, "messages": QUESTION, "temperature": 0, "max_tokens": 12}
    async with openai.AsyncOpenAI(base_url=server.base_url, api_key=server.key) as client:
        asks = [client.chat.completions.create(**options) for _ in range(4)]
        texts = {answer.choices[0].message.content for answer in await asyncio.gather(*asks)}
        stream = await client.chat.completions.create(**options, stream=True)
        streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert texts == {streamed}
        task = asyncio.create_task(client.completions.create(model=server.model, **LONG))
        await asyncio.to_thread(server.wait_for, 1)
        task.cancel()
        await asyncio.to_thread(server.wait_for, 0)


def test_responses(client, server):
    options = {"model": server.model, "temperature": 0, "max_output_tokens": 64}
    asked = {**options, "input": QUESTION[0]["content"]}
    answer = client.responses.create(**asked)
    assert "Paris" in answer.output_text and answer.status == "completed"
    with client.responses.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == answer.output_text
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    turns = [*QUESTION, *answer.output, {"role": "user", "content": "Sure?"}]
    again = client.responses.create(**options, input=turns, instructions="Answer briefly.")
    assert again.usage.input_tokens > answer.usage.input_tokens
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**asked, previous_response_id=answer.id)
    assert caught.value.param == "previous_response_id"


def test_embeddings(client, server):
    texts = ["The capital of France is Paris.", "A cat sleeps."]

    def embed(given: Any = texts, **options: Any) -> Any:
        return client.embeddings.create(model=server.model, input=given, user="u", **options)

    answer = embed()  # the client asks for base64
    assert (answer.object, [item.index for item in answer.data]) == ("list", [0, 1])
    assert answer.usage.prompt_tokens == answer.usage.total_tokens
    vectors = [item.embedding for item in answer.data]
    assert [sum(x * x for x in vector) for vector in vectors] == pytest.approx([1, 1], abs=1e-4)
    floats = [item.embedding for item in embed(encoding_format="float").data]
    for one, other in zip(vectors, floats, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert embed(texts[0]).data[0].embedding == pytest.approx(vectors[0], abs=1e-5)
    short = embed(dimensions=64).data[0].embedding
    assert len(short) == 64
    assert sum(x * x for x in short) == pytest.approx(1, abs=1e-4)
    assert [len(item.embedding) for item in embed([[3, 4, 5], [6]]).data] == [len(vectors[0])] * 2
    for given, options, param in [
        ("", {}, "input"),
        ([3, 10**6], {}, "input"),
        ("word " * 9000, {}, "input"),
        ("a", {"dimensions": 10**6}, "dimensions"),
    ]:
        with pytest.raises(openai.BadRequestError) as caught:
            embed(given, **options)
        assert caught.value.param == param


def test_responses_with_tools(client, server):
    tool = {"type": "function", **WEATHER["function"]}
    options = {"model": server.model, "temperature": 0, "max_output_tokens": 200}
    forced = {"tool_choice": "required", "parallel_tool_calls": False, "input": QUESTION}
    answer = client.responses.create(**options, **forced, tools=[tool])
    (call,) = answer.output
    assert (call.type, call.name, call.status) == ("function_call", "Weather", "completed")
    Weather.model_validate_json(call.arguments)
    with client.responses.stream(**options, **forced, tools=[tool]) as stream:
        events = list(stream)
        final = stream.get_final_response()
    deltas = [e for e in events if e.type == "response.function_call_arguments.delta"]
    assert deltas[-1].snapshot == final.output[0].arguments
    assert json.loads(final.output[0].arguments) == json.loads(call.arguments)

    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."}
    said = client.responses.create(**options, tools=[tool], input=[*QUESTION, call, result])
    assert said.usage.input_tokens > answer.usage.input_tokens and said.output
    forced["tool_choice"] = {"type": "function", "name": "Weather"}
    parsed = client.responses.parse(
        **options, **forced, tools=[openai.pydantic_function_tool(Weather)]
    )
    assert isinstance(parsed.output[0].parsed_arguments, Weather)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**options, input="Hi", tools=[{"type": "web_search"}])
    assert caught.value.param == "tools"


def test_log_probabilities_of_responses(client, server):
    answer = client.responses.create(
        model=server.model,
        input=QUESTION,
        max_output_tokens=8,
        include=["message.output_text.logprobs"],
        top_logprobs=2,
    )
    (part,) = answer.output[0].content
    assert len(part.logprobs) == answer.usage.output_tokens
    assert all(len(entry.top_logprobs) == 2 for entry in part.logprobs)


def test_parsed_responses(client, server):
    answer = client.responses.parse(
        model=server.model, input="Invent a person.", text_format=Person, max_output_tokens=400
    )
    assert isinstance(answer.output_parsed, Person)
