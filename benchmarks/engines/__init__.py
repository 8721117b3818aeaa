"""Adapters that make each engine run the same requests."""

from __future__ import annotations

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.workloads import Requests

if TYPE_CHECKING:  # a peer's interpreter has no engine
    from engine import StepRecord

ENGINES: dict[str, str] = {
    "trunkline": "benchmarks.engines.trunkline:Trunkline",
    "transformers": "benchmarks.engines.transformers_generate:TransformersGenerate",
    "vllm": "benchmarks.engines.vllm_generate:VllmGenerate",
    "llama.cpp": "benchmarks.engines.llama_cpp_batch:LlamaCpp",
}
"""Engine → where its adapter is; imported only in the process that measures it."""


@dataclass(frozen=True)
class RequestTimes:
    """Seconds from the arrival of a request to its first and to its last token."""

    first_token: float
    finished: float


class Engine(ABC):
    """An engine with its model loaded."""

    vocab_size: int
    request_times: list[RequestTimes] | None = None
    """Times of the requests of the last `run`, in their order, where the engine tells them."""

    @abstractmethod
    def run(self, requests: Requests) -> list[list[int]]:
        """Generate exactly the tokens that `requests` asks for and return them."""

    def describe(self) -> dict[str, Any]:
        """What the engine settled on at start, as far as it tells; plain values."""
        return {}

    def profile(self, requests: Requests) -> Sequence[StepRecord] | None:
        """Run `requests` under the engine's profile; None where it has none."""
        return None


@dataclass(frozen=True)
class EngineSpec:
    """An engine and its options, as written on the command line: `name[:option=value,…]`."""

    label: str
    name: str
    options: dict[str, Any]

    @classmethod
    def parse(cls, label: str) -> EngineSpec:
        """Read `label`; values are JSON where they can be, else strings.

        Raises:
            ValueError: the engine is unknown or an option has no value.
        """
        name, _, rest = label.partition(":")
        if name not in ENGINES:
            raise ValueError(f"unknown engine '{name}'; there are {', '.join(ENGINES)}")
        options = {}
        for part in filter(None, rest.split(",")):
            key, equals, value = part.partition("=")
            if not equals:
                raise ValueError(f"option '{part}' of '{name}' must be written as option=value")
            options[key] = _json_or_text(value)
        return cls(label, name, options)

    def load(self, model: str, load_format: str) -> Engine:
        """Load `model` (`load_format` `dummy`: its shape alone) into this engine."""
        module, _, name = ENGINES[self.name].partition(":")
        engine: Engine = getattr(importlib.import_module(module), name)(
            model, load_format, **self.options
        )
        return engine


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
