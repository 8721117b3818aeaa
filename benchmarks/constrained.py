"""What outputs that follow JSON schemas cost the steps of one engine.

    python -m benchmarks.constrained --model qwen2.5-7b

The same requests run in turns without a schema, and with as many different ones among them as
`--grammars` says; `share` is how much longer the median decode step is than without a schema. A
shape gets random weights and a tokenizer of its vocabulary's size. Texts of random tokens run into
`--max-length` again and again, where a mask takes longest to compute.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.machine import describe_run
from benchmarks.models import find_shape
from benchmarks.serving.shape_tokenizer import model_with_tokenizer
from benchmarks.step_profile import host_seconds, period_seconds
from benchmarks.workloads import Requests, Workload
from engine import LLM, SamplingParams, StepRecord, StructuredOutputsParams

Form = Callable[[int, int], StructuredOutputsParams]
"""From a grammar's number and an output's tokens."""
_TEMPERATURE = 0.7
_SHORTEST_ITEM = 12
"""Tokens of an item of `schema`, at the least."""


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = _parse(words)
    try:
        run(options)
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        sys.exit(f"benchmarks.constrained: {error}")


def run(options: argparse.Namespace) -> None:
    """Measure, write the result file and print its table."""
    started = datetime.now(UTC)
    with tempfile.TemporaryDirectory() as folder:
        load_format = "dummy" if find_shape(options.model) else "auto"
        llm = LLM(
            model_with_tokenizer(options.model, Path(folder)),
            load_format=load_format,
            enable_prefix_caching=False,
            max_num_seqs=options.rows,
        )
        form = partial(_form, options.max_length)
        records = measure(llm, _workload(options), options.grammars, options.rounds, form)
    document = {
        **describe_run("benchmarks.constrained", options.words, started),
        "model": options.model,
        "max_length": options.max_length,
        "records": records,
    }
    out = options.out or results.FOLDER / f"constrained-{started:%Y%m%d-%H%M%S}.json"
    results.write(document, out)
    print(f"{out}\n{table(records)}")


def measure(
    llm: LLM,
    workload: Workload,
    grammars: Sequence[int],
    rounds: int,
    form: Form,
) -> list[dict[str, Any]]:
    """A record for the requests without a schema, and for each number of different ones.

    Raises:
        RuntimeError: an output ended before its length.
    """
    cases = [0, *grammars]
    steps: dict[int, list[float]] = {number: [] for number in cases}
    for number in cases:  # kernels and grammars are compiled
        _run(llm, workload.draw(llm.core.info.vocab_size, 0), number, form)
    for seed in range(1, rounds + 1):
        for number in cases:
            llm.start_profile()
            _run(llm, workload.draw(llm.core.info.vocab_size, seed), number, form)
            steps[number] += _step_seconds(llm.stop_profile(), workload.requests)
    free = statistics.median(steps[0])
    return [{"rows": workload.requests, **_record(number, steps[number], free)} for number in cases]


def schema(number: int, items: int, max_length: int | None = None) -> dict[str, Any]:
    """A schema of a list of so many items at the least; another number makes another grammar.

    `max_length` is that of texts.
    """
    text: dict[str, Any] = {"type": "string"}
    if max_length is not None:
        text["maxLength"] = max_length
    properties = {
        "name": text,
        "age": {"type": "integer"},
        "member": {"type": "boolean"},
        "tags": {"type": "array", "items": text},
    }
    item = {"type": "object", "properties": properties, "required": list(properties)}
    return {"title": f"list {number}", "type": "array", "items": item, "minItems": items}


def table(records: Iterable[dict[str, Any]]) -> str:
    """A Markdown table of the records."""
    rows = [
        f"| {r['rows']} | {r['schemas']} | {r['steps']} | {r['ms_per_step']:.3f} "
        f"| {r['mean_ms']:.3f} | {r['p90_ms']:.3f} | {r['share']:+.1%} |"
        for r in records
    ]
    head = "| rows | schemas | steps | ms/step, median | mean | p90 | more than without |"
    return "\n".join([head, "|---:|---:|---:|---:|---:|---:|---:|", *rows])


def _run(llm: LLM, requests: Requests, grammars: int, form: Form) -> None:
    """Run requests to their full length under so many schemas."""
    params = [
        SamplingParams(
            temperature=requests.temperature,
            max_tokens=size,
            ignore_eos=True,
            detokenize=False,
            seed=index,
            structured_outputs=form(index % grammars, size) if grammars else None,
        )
        for index, size in enumerate(requests.outputs)
    ]
    prompts = [{"prompt_token_ids": prompt} for prompt in requests.prompts]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    lengths = [len(output.outputs[0].token_ids) for output in outputs]
    if lengths != requests.outputs:
        raise RuntimeError(f"the engine made {lengths} tokens, not {requests.outputs}")


def _form(max_length: int | None, number: int, tokens: int) -> StructuredOutputsParams:
    items = math.ceil(tokens / _SHORTEST_ITEM)
    return StructuredOutputsParams(json=schema(number, items, max_length))


def _step_seconds(steps: Iterable[StepRecord], rows: int) -> list[float]:
    """Of each decode step of all rows: from the end of the step before, where the device tells."""
    full = [step for step in steps if step.decode and step.rows == rows]
    periods = [host_seconds(s) if s.device_s is None else period_seconds(s) for s in full]
    return [seconds for seconds in periods if seconds is not None]


def _record(schemas: int, seconds: Sequence[float], free: float) -> dict[str, Any]:
    """Of so many schemas; `share` is over the median seconds without one."""
    median = statistics.median(seconds)
    tail = statistics.quantiles(seconds, n=10, method="inclusive")[-1]
    return {
        "schemas": schemas,
        "steps": len(seconds),
        "ms_per_step": round(median * 1e3, 4),
        "mean_ms": round(statistics.fmean(seconds) * 1e3, 4),
        "p90_ms": round(tail * 1e3, 4),
        "share": round(median / free - 1, 4),
    }


def _workload(options: argparse.Namespace) -> Workload:
    prompt, output = options.prompt_tokens, options.output_tokens
    name = f"{options.rows}x{prompt}-{output}"
    return Workload(name, options.rows, (prompt, prompt), (output, output), _TEMPERATURE)


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.constrained", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(words=sys.argv[1:] if words is None else words)
    parser.add_argument("--model", default="qwen2.5-7b", help="name, directory or GGUF file")
    parser.add_argument("--rows", type=int, default=32, help="requests at once")
    parser.add_argument("--grammars", type=int, nargs="+", default=[1, 32], metavar="SCHEMAS")
    parser.add_argument("--max-length", type=int, metavar="CHARACTERS", help="of texts")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, in turns")
    parser.add_argument("--out", type=Path, help="file to write, in benchmarks/results if unset")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
