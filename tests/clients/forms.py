"""What answers are to look like; every part of it is bounded, so that a small model ends it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=150)
    moods: list[Literal["calm", "loud", "odd"]] = Field(max_length=3)


class Weather(BaseModel):
    """Tell the weather in a city."""

    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=9)


WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "Weather",
        "description": "Tell the weather in a city.",
        "parameters": Weather.model_json_schema(),
    },
}
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
INVENT: list[Any] = [{"role": "user", "content": "Invent a person."}]
