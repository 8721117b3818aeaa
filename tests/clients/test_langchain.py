"""LangChain's `ChatOpenAI`."""

from __future__ import annotations

import pytest
from forms import QUESTION, Person, Weather
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI

ASK = QUESTION[0]["content"]


@pytest.fixture
def model(server) -> ChatOpenAI:
    return ChatOpenAI(
        model=server.model,
        base_url=server.base_url,
        api_key=server.key,
        temperature=0,
        max_tokens=200,
        max_retries=0,
    )


def test_invoke(model):
    answer = model.invoke([SystemMessage("Be brief."), HumanMessage(ASK)])
    assert isinstance(answer, AIMessage) and answer.content
    assert answer.usage_metadata["output_tokens"] > 0
    assert answer.response_metadata["finish_reason"] == "stop"


def test_stream(model):
    chunks = list(model.stream(ASK, stream_usage=True))
    total = sum(chunks[1:], chunks[0])
    assert total.content == model.invoke(ASK).content
    assert total.usage_metadata["output_tokens"] > 0
    assert len(list(model.stream("Write a long story."))) > 3


def test_batch(model):
    assert len({answer.content for answer in model.batch([ASK, ASK, ASK])}) == 1


async def test_async(model):
    text = "".join([chunk.content async for chunk in model.astream(ASK)])
    assert text == (await model.ainvoke(ASK)).content


def test_bind_tools(model):
    caller = model.bind_tools([Weather], tool_choice="any", parallel_tool_calls=False)
    (call,) = caller.invoke("Weather in Rome?").tool_calls
    assert call["name"] == "Weather"
    Weather.model_validate(call["args"])
    chunks = list(caller.stream("Weather in Rome?"))
    assert sum(chunks[1:], chunks[0]).tool_calls[0]["args"] == call["args"]


def test_tools_that_may_be_called(model):
    answer = model.bind_tools([Weather]).invoke("Say hello.")
    assert isinstance(answer, AIMessage)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(model, method):
    answer = model.with_structured_output(Person, method=method).invoke("Invent a person.")
    assert isinstance(answer, Person)


def test_responses_api(model, server):
    through = ChatOpenAI(
        model=server.model,
        base_url=server.base_url,
        api_key=server.key,
        temperature=0,
        max_tokens=200,
        use_responses_api=True,
    )
    assert through.invoke(ASK).text == model.invoke(ASK).text
    chunks = list(through.stream(ASK))
    assert sum(chunks[1:], chunks[0]).text == model.invoke(ASK).text
