"""`instructor`, which takes answers into pydantic models."""

from __future__ import annotations

from typing import Any

import instructor
import openai
import pytest
from forms import INVENT, Person
from pydantic import BaseModel, Field

MODES = [instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA]


@pytest.fixture
def plain(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.base_url, api_key=server.key, max_retries=0)


@pytest.fixture
def options(server) -> dict[str, Any]:
    return {"model": server.model, "messages": INVENT, "max_tokens": 300, "max_retries": 0}


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_extraction(plain, options, mode):
    client = instructor.from_openai(plain, mode=mode)
    person = client.chat.completions.create(**options, response_model=Person, temperature=0)
    assert isinstance(person, Person)


class Crowd(BaseModel):
    """People, too many for their tokens to come all at once, however slow the machine."""

    people: list[Person] = Field(min_length=5, max_length=5)


def test_partial_answers(plain, options):
    options["max_tokens"] = 800
    client = instructor.from_openai(plain, mode=instructor.Mode.TOOLS)
    parts = list(client.chat.completions.create_partial(**options, response_model=Crowd))
    assert len(parts) > 2
    Crowd.model_validate(parts[-1].model_dump())


async def test_async(server, options):
    async with openai.AsyncOpenAI(base_url=server.base_url, api_key=server.key) as plain:
        client = instructor.from_openai(plain, mode=instructor.Mode.JSON_SCHEMA)
        person = await client.chat.completions.create(**options, response_model=Person)
    assert isinstance(person, Person)
