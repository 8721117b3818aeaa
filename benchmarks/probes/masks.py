"""What structured outputs cost beside the model: masks of a step, from its tokens to the masks.

`masks` is what the engine waits for, processes and all, and `fill` the part of it in which a
grammar's process computes, done in this process. Rows write the same JSON text, each some tokens
behind the one before it. A pause before each step stands for the model's forward pass, in which the
grammars' processes fall asleep. Needs no GPU, and says nothing of the kernel that applies masks.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.models import BUNDLED_MODEL
from benchmarks.probes.records import Record, spread_record
from benchmarks.serving.shape_tokenizer import model_with_tokenizer
from engine import SamplingParams, StructuredOutputsParams
from engine.model_source import resolve_model
from engine.request import EngineRequest, Request
from engine.structured_outputs.constraints import Constraints
from engine.structured_outputs.grammar import GrammarHost
from engine.structured_outputs.messages import MaskRequest, RowState, Setup
from engine.structured_outputs.process import Matchers, Vocabulary, compile_grammar
from engine.tokenizer import Tokenizer

_CASES = ((1, 1), (8, 1), (32, 1), (32, 4), (32, 32))
_FORWARD_S = 0.004
_WARM_UP = 20
"""Steps that are not counted."""
_TEXT = json.dumps(
    {
        "name": "Ada of London",
        "age": 36,
        "tags": ["mathematics", "poetry", "engines of all kinds"],
        "note": "A long note on how things were in those days, and how they came to be. " * 16,
    }
)


def schema(number: int) -> str:
    """A schema for `_TEXT`; another number makes another grammar of the same text."""
    text = {"type": "string"}
    properties = {
        "name": text,
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": text},
        "note": text,
    }
    return json.dumps(
        {
            "title": f"grammar {number}",
            "type": "object",
            "properties": properties,
            "required": list(properties),
        }
    )


def measure(
    models: Sequence[str] = (BUNDLED_MODEL, "qwen2.5-7b"),
    steps: int = 200,
    cases: Sequence[tuple[int, int]] = _CASES,
) -> Iterator[Record]:
    """Measure at the vocabularies of some models.

    Args:
        models: a shape gets a tokenizer of its vocabulary's size.
        steps: of each measurement; `_WARM_UP` of them are not counted.
        cases: (rows, different grammars among them).
    """
    for name in models:
        with tempfile.TemporaryDirectory() as folder:
            model = model_with_tokenizer(name, Path(folder))
            yield from _measure_model(name, model, steps, cases)


def _measure_model(
    name: str, model: str, steps: int, cases: Sequence[tuple[int, int]]
) -> Iterator[Record]:
    tokenizer = Tokenizer.load(resolve_model(model))
    tokens = tokenizer.encode(_TEXT, add_special_tokens=False)
    setup = Setup(model, tokenizer.vocab_size, tokenizer.eos_token_ids)
    shape = {"model": name, "vocabulary": setup.width}
    for rows in sorted({rows for rows, _ in cases}):
        seconds = _fill_seconds(setup, tokens, rows, steps)[_WARM_UP:]
        yield spread_record("fill", {**shape, "rows": rows}, seconds)
    host = GrammarHost(setup)
    for rows, grammars in cases:
        seconds = _mask_seconds(host, tokens, rows, grammars, steps)[_WARM_UP:]
        yield spread_record("masks", {**shape, "rows": rows, "grammars": grammars}, seconds)


def _fill_seconds(setup: Setup, tokens: list[int], rows: int, steps: int) -> list[float]:
    """Of each step: what the process of one grammar computes for so many rows."""
    tokenizer = Tokenizer.load(resolve_model(setup.model))
    source = StructuredOutputsParams(json=schema(0)).source()
    matchers = Matchers(compile_grammar(source, Vocabulary(tokenizer, setup)))
    masks = np.empty((rows, -(-setup.width // 32)), dtype=np.int32)
    unwanted, seconds = list(setup.eos_token_ids), []
    for step in range(steps):
        asked = [
            RowState(row, tokens[step + row - 1 : step + row] if step else tokens[:row], unwanted)
            for row in range(rows)
        ]
        time.sleep(_FORWARD_S)
        began = time.perf_counter()
        matchers.fill(MaskRequest(asked, []), masks)
        seconds.append(time.perf_counter() - began)
    return seconds


def _mask_seconds(
    host: GrammarHost, tokens: list[int], rows: int, grammars: int, steps: int
) -> list[float]:
    """Of each step: from the tokens of all rows to their masks."""
    constraints = Constraints(host, host.setup.eos_token_ids)
    requests = _start_rows(constraints, rows, grammars)
    for row, request in enumerate(requests):
        request.token_ids += tokens[:row]
    seconds = []
    for step in range(steps):
        time.sleep(_FORWARD_S)
        began = time.perf_counter()
        _, errors = constraints.masks(enumerate(requests), host.setup.width)
        seconds.append(time.perf_counter() - began)
        if errors:
            raise RuntimeError(f"step {step}: {errors[0][1]}")
        for row, request in enumerate(requests):
            request.token_ids.append(tokens[step + row])
    return seconds


def _start_rows(constraints: Constraints, rows: int, grammars: int) -> list[Request]:
    """Requests without a prompt whose grammars are compiled."""
    for row in range(rows):
        form = StructuredOutputsParams(json=schema(row % grammars))
        params = SamplingParams(structured_outputs=form, ignore_eos=True, max_tokens=None)
        wire = EngineRequest(f"row-{row}", [], params)
        constraints.add(Request.from_wire(wire, max_model_len=1 << 20))
    ready: list[Request] = []
    while len(ready) < rows:
        compiled, refused = constraints.take_ready(may_wait=True)
        if refused:
            raise RuntimeError(refused[0][1])
        ready += compiled
    return ready
