"""Time of a decode step by batch size and context length, beside the roofline.

    python -m benchmarks.sweep run --model qwen2.5-7b --batches 1 8 64 512 --contexts 256 1024 4096
    python -m benchmarks.sweep plot benchmarks/results/sweep-qwen2.5-7b.json

One engine serves the whole sweep. Its prefix cache is on and every batch takes the same prompts, so
that a context costs its prefill once; no row shares keys with another. A step's time is the
device's own (`device_s`), or the host's where the device tells none. The ceilings are those of all
GPUs that share the model. `run` needs no matplotlib.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.engines import EngineSpec
from benchmarks.exchanges import exchange_share
from benchmarks.machine import (
    describe_run,
    read_gpu_memory,
)
from benchmarks.models import find_model, find_shape, read_vocab_size
from benchmarks.roofline import Ceilings, Shape
from benchmarks.step_profile import host_seconds, period_seconds, step_seconds
from benchmarks.workloads import FIRST_TOKEN
from engine import LLM, SamplingParams, StepRecord

_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
_ROOM = 256
"""Tokens that a request may go on while the last ones of its batch are being prefilled."""
_IMAGES = Path(__file__).parent.parent / "docs" / "images"


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    options = _parse(arguments)
    try:
        options.action(options)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"benchmarks.sweep: {error}")


def run(options: argparse.Namespace) -> None:
    """Measure every batch size at every context length and write the file."""
    started = datetime.now(UTC)
    engine_options = EngineSpec.parse(options.engine).options
    llm = _start(options, engine_options)
    info = llm.core.info
    shape = Shape.read(Path(find_model(options.model)), _ITEMSIZE[info.dtype])
    ranks = int(engine_options.get("tensor_parallel_size", 1))
    ceilings = Ceilings(ranks * options.bandwidth * 1e12, ranks * options.flops * 1e12)
    records = sweep(llm, shape, ceilings, options)
    document = {
        **describe_run("benchmarks.sweep", options.words, started),
        "model": options.model,
        "dtype": info.dtype,
        "kv_cache_tokens": info.num_blocks * info.block_size,
        "engine_options": engine_options,
        "ceilings": {"tb_s": options.bandwidth, "tflop_s": options.flops},
        "gpu_memory": read_gpu_memory(),
        "seed": options.seed,
        "records": records,
    }
    out = options.out or results.FOLDER / f"sweep-{Path(options.model).name}.json"
    results.write(document, out)
    print(f"{out}\n{table(records)}")


def sweep(
    llm: Any, shape: Shape, ceilings: Ceilings, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One record for each context length and batch size that the KV cache has room for.

    Contexts ascend and batches descend, so that prompts are found in the prefix cache.
    """
    draw = random.Random(options.seed)
    longest = max(options.contexts)
    vocabulary = range(FIRST_TOKEN, read_vocab_size(options.model))
    prompts = [draw.choices(vocabulary, k=longest) for _ in range(max(options.batches))]
    records = []
    for context in sorted(options.contexts):
        for batch in sorted(options.batches, reverse=True):
            count = _output_tokens(llm, batch, context, options.steps)
            if not _fits(llm, batch, context + count):
                print(f"batch {batch} at {context}: more than the KV cache holds", file=sys.stderr)
                continue
            short = [prompt[:context] for prompt in prompts[:batch]]
            steps = _measure(llm, short, count, options.temperature)
            if not steps:
                print(f"batch {batch} at {context}: no step held all rows", file=sys.stderr)
                continue
            record = _record(steps, batch, context, shape, ceilings)
            if options.exchanges:
                again = partial(_generate, llm, short, count, options.temperature)
                record["exchange_share"] = exchange_share(again, shape.layers, options.steps // 2)
            print(f"batch {batch} at {context}: {_tell(record)}", file=sys.stderr)
            records.append(record)
    return records


def _start(options: argparse.Namespace, engine_options: dict[str, Any]) -> Any:
    """An engine whose limits fit the sweep; `engine_options` go before."""
    load_format = "dummy" if find_shape(options.model) else options.load_format
    settings: dict[str, Any] = {
        "load_format": load_format,
        "max_num_seqs": max(options.batches),
        "max_model_len": max(options.contexts) + options.steps + _ROOM,
        "enable_prefix_caching": True,
        **engine_options,
    }
    return LLM(model=find_model(options.model), **settings)


def _output_tokens(llm: Any, batch: int, context: int, steps: int) -> int:
    """Output tokens that leave `steps` pure decode steps once the whole batch is prefilled.

    Of a cached prompt the last block is computed anew; meanwhile the first requests decode.
    """
    info = llm.core.info
    fresh = batch * min(context, info.block_size)
    prefills: int = math.ceil(fresh / info.max_num_batched_tokens)
    return steps + prefills + 2


def _fits(llm: Any, batch: int, tokens: int) -> bool:
    info = llm.core.info
    return bool(batch * math.ceil(tokens / info.block_size) < info.num_blocks)


def _measure(
    llm: Any, prompts: list[list[int]], output_tokens: int, temperature: float
) -> list[StepRecord]:
    """The decode steps in which every prompt had its row; the first of them is dropped."""
    _generate(llm, prompts, 1, temperature)  # fills the prefix cache
    llm.start_profile()
    try:
        _generate(llm, prompts, output_tokens, temperature)
    finally:
        steps: Sequence[StepRecord] = llm.stop_profile()
    full = [step for step in steps if step.decode and step.rows == len(prompts)]
    return full[1:] or full


def _generate(llm: Any, prompts: list[list[int]], tokens: int, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, max_tokens=tokens, ignore_eos=True, seed=0)
    llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)


def _record(
    steps: Sequence[StepRecord], batch: int, context: int, shape: Shape, ceilings: Ceilings
) -> dict[str, Any]:
    """Medians over `steps` beside the floor at the keys that they attended to on average."""
    keys = statistics.fmean(step.context_tokens for step in steps)
    floor = shape.decode_floor(batch, keys, ceilings)
    seconds = statistics.median(map(step_seconds, steps))
    return {
        "batch": batch,
        "context": context,
        "steps": len(steps),
        "context_tokens": round(keys, 1),
        "clock": "host" if steps[0].device_s is None else "device",
        "step_s": round(seconds, 8),
        "step_and_idle_s": _median(map(period_seconds, steps)),
        "host_s": _median(map(host_seconds, steps)),
        "bytes": round(shape.decode_bytes(keys)),
        "flops": round(shape.decode_flops(batch, keys)),
        "floor_s": round(floor, 8),
        "roofline_share": round(floor / seconds, 4),
    }


def _median(values: Iterable[float | None]) -> float | None:
    listed = [value for value in values if value is not None]
    return round(statistics.median(listed), 8) if listed else None


def _tell(record: dict[str, Any]) -> str:
    return f"{record['step_s'] * 1e3:.3f} ms, {record['roofline_share']:.0%} of the roofline"


def table(records: Iterable[dict[str, Any]]) -> str:
    """A Markdown table of a sweep."""
    rows = [
        f"| {r['context']} | {r['batch']} | {r['step_s'] * 1e3:.3f} | {r['floor_s'] * 1e3:.3f} "
        f"| {r['roofline_share']:.0%} | {r['batch'] / r['step_s']:,.0f} |"
        for r in records
    ]
    head = "| context | batch | step (ms) | floor (ms) | of roofline | tok/s |"
    return "\n".join([head, "|---:|---:|---:|---:|---:|---:|", *rows])


def plot(options: argparse.Namespace) -> None:
    """Draw the plots of a result file, as PNG and SVG."""
    from benchmarks.plots import plot_sweep

    for file in plot_sweep(results.read(options.file), options.images, options.file.stem):
        print(file)


def _parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.sweep", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run", help="measure and write a result file")
    running.set_defaults(action=run, words=sys.argv[1:] if words is None else words)
    running.add_argument("--model", required=True, help="name of a shape, or a model directory")
    running.add_argument("--load-format", choices=("auto", "dummy"), default="auto")
    batches = [2**power for power in range(10)]
    running.add_argument("--batches", type=int, nargs="+", default=batches)
    running.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 4096])
    running.add_argument("--steps", type=int, default=24, help="decode steps of each measurement")
    running.add_argument("--temperature", type=float, default=0.0)
    running.add_argument("--bandwidth", type=float, default=4.30, help="ceiling in TB/s")
    running.add_argument("--flops", type=float, default=790.0, help="ceiling in TFLOP/s")
    running.add_argument(
        "--exchanges", action="store_true", help="profile what ranks spend in exchanges as well"
    )
    running.add_argument("--engine", default="trunkline", help="trunkline[:OPTION=VALUE,…]")
    running.add_argument("--seed", type=int, default=0, help="of the prompts")
    running.add_argument("--out", type=Path, help="file to write, in benchmarks/results if unset")
    plotting = commands.add_parser("plot", help="draw a result file")
    plotting.set_defaults(action=plot)
    plotting.add_argument("file", type=Path)
    plotting.add_argument("--images", type=Path, default=_IMAGES, help="folder to draw into")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
