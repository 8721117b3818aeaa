"""From an engine configuration to a runner that is loaded, sized and warm."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from engine.attention import select_backend
from engine.attention.spans import SpanPlan
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.failures import Failure, classify
from engine.model_config import ModelConfig, read_model_config
from engine.model_source import resolve_model
from engine.parallel.group import ALONE, TensorGroup
from engine.parallel.share import share_of
from engine.runner.cuda_graphs import graph_sizes, padded_graph_sizes
from engine.runner.input_batch import InputBatch
from engine.runner.kv_memory import CacheLayout, count_blocks
from engine.runner.model_runner import ModelRunner
from engine.sampling.sampler import Sampler
from engine.sampling.warm_up import sampling_warm_ups
from engine.sampling_params import MAX_LOGPROBS, SamplingParams
from engine.startup import Stopwatch
from engine.step import NewRow, StepPlan
from engine.step_times import UNKNOWN_TIMES, StepTimes
from engine.weights.loader import load_model

DEFAULT_BATCHED_TOKENS = {"cuda": 16384, "cpu": 1024}
_COMPILERS = 8
"""Threads that compile kernels on a GPU's first start, beside the one of the largest step."""
_TIMED_LENGTH, _TIMED_PROMPTS = 1024, 4
"""Of a step that is timed as those without a graph."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(slots=True, frozen=True)
class EngineInfo:
    """What an engine settled on at start."""

    model: str
    device: str
    dtype: str
    vocab_size: int
    hidden_size: int
    max_model_len: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int
    eos_token_ids: tuple[int, ...]
    startup_seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of each stage of the start, in order."""
    step_times: StepTimes = UNKNOWN_TIMES
    """Unknown without CUDA graphs."""


def build_runner(
    config: EngineConfig, stopwatch: Stopwatch, group: TensorGroup = ALONE
) -> tuple[ModelRunner, EngineInfo]:
    """Load the model, size and allocate the KV cache, and run every path once.

    Args:
        config: of the engine.
        stopwatch: gets the times of the start's stages.
        group: the ranks that share the model, each of which builds a runner at the same time.

    Raises:
        ConfigError: an option does not fit the model or the machine.
    """
    source = resolve_model(config.model)
    shape = read_model_config(source)
    device = choose_device(config)
    _check_stream(device)
    if device.type == "cpu":
        _set_threads(config, group)
    dtype = choose_dtype(config, shape, device)
    max_model_len = config.resolve_max_model_len(shape.max_position_embeddings)
    step_tokens = config.max_num_batched_tokens or DEFAULT_BATCHED_TOKENS[device.type]
    max_seqs = config.max_num_seqs
    group.share_memory(shape.hidden_size, dtype, device)
    with _memory_for(f"the weights of {config.model}", "take a smaller model or dtype"):
        model = load_model(config, source, shape, dtype, device, max_model_len, group)
    stopwatch.lap("weights")
    backend = select_backend(
        config.attention_backend, device, dtype, shape.head_dim, config.kvcache_block_size
    )
    layout = CacheLayout.of(config, share_of(shape, group.size), backend, dtype)
    spans = SpanPlan(backend.spans_at_a_time(layout.num_kv_heads, device), shape.sliding_window)
    row_blocks = math.ceil(max_model_len / layout.block_size)
    with _memory_for("the requests' rows", "lower max_num_seqs or max_model_len"):
        batch = InputBatch(max_seqs, row_blocks, layout.block_size, step_tokens, device, spans)
        sampler = Sampler(max_seqs, shape.vocab_size, device, shape.eos_token_ids)
        runner = ModelRunner(model, backend, layout.allocate(1, device), batch, sampler)
    if device.type == "cuda":
        calls = [*model.warm_ups(), *sampling_warm_ups(shape.vocab_size, device, dtype)]
        lower = f"lower max_num_batched_tokens (now {step_tokens}) or max_num_seqs"
        with _memory_for("the activations of the largest step", lower):
            _compile(runner, calls, max_seqs, step_tokens, max_model_len)
            stopwatch.lap("kernels")
            _run_largest_step(runner, max_seqs, step_tokens, max_model_len)
        stopwatch.lap("largest step")
    num_blocks = _fill_memory(runner, config, layout, step_tokens, max_model_len, stopwatch)
    return runner, EngineInfo(
        model=config.model,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        max_model_len=max_model_len,
        max_num_batched_tokens=step_tokens,
        block_size=layout.block_size,
        num_blocks=num_blocks,
        eos_token_ids=shape.eos_token_ids,
        startup_seconds=dict(stopwatch.seconds),
        step_times=runner.step_times,
    )


@contextmanager
def _memory_for(what: str, remedy: str) -> Iterator[None]:
    """Let an allocation that fails say what it was for and what to change."""
    try:
        yield
    except Exception as error:
        if classify(error) is not Failure.OUT_OF_MEMORY:
            raise
        raise ConfigError(f"there is no memory for {what}; {remedy}.") from error


def choose_device(config: EngineConfig) -> torch.device:
    """Where the engine is to run.

    Raises:
        ConfigError: on a GPU, and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda' but torch sees no GPU; set device to 'cpu' or 'auto'.")
    if config.device != "auto":
        return torch.device(config.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _set_threads(config: EngineConfig, group: TensorGroup) -> None:
    """Not torch's default: launchers such as Ray set OMP_NUM_THREADS to what they account for."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(config.cpu_threads or max(1, cores // group.size))


def _check_stream(device: torch.device) -> None:
    """Engines share scratch memory, see `engine.kernels.launch`: one stream keeps them in order."""
    if device.type != "cuda":
        return
    if torch.cuda.current_stream(device) != torch.cuda.default_stream(device):
        raise ConfigError(
            "an engine runs on the default CUDA stream, and another one is current; build and use "
            "it outside of torch.cuda.stream(...)."
        )


def choose_dtype(config: EngineConfig, shape: ModelConfig, device: torch.device) -> torch.dtype:
    """Type of the weights and of the cache."""
    name = config.dtype
    if name == "auto" and device.type == "cpu":
        name = "float32"
    return _DTYPES[shape.dtype if name == "auto" else name]


def _warm_up(runner: ModelRunner, prompt_len: int) -> None:
    """Run a prefill and a decode step in the null block, so that no request pays for first use."""
    new_row = NewRow(0, "warm-up", SamplingParams(seed=0), [0] * prompt_len, prompt_len)
    prefill = StepPlan(0, [0], [0], [prompt_len], [True], {0: [0] * prompt_len}, [new_row])
    decode = StepPlan(1, [0], [prompt_len - 1], [1], [True])
    for plan in (prefill, decode):
        runner.execute(plan).result()


def _fill_memory(
    runner: ModelRunner,
    config: EngineConfig,
    layout: CacheLayout,
    step_tokens: int,
    max_model_len: int,
    stopwatch: Stopwatch,
) -> int:
    """Give the KV cache what is left, and warm up in the rest; returns the number of blocks."""
    device = runner.batch.device
    own = count_blocks(config, layout, device, max_model_len)
    num_blocks = int(runner.model.group.least(own, device))  # what all ranks have room for
    lower = "lower gpu_memory_utilization, kv_cache_memory_bytes or num_kvcache_blocks"
    with _memory_for(f"a KV cache of {num_blocks} blocks", lower):
        runner.kv_caches = layout.allocate(num_blocks, device)
    stopwatch.lap("KV cache")
    with _memory_for("anything beside the KV cache", f"{lower}, or max_num_seqs"):
        _warm_up(runner, min(16, max_model_len))
        stopwatch.lap("warm-up")
        if device.type == "cuda" and not config.enforce_eager and runner.backend.capturable:
            padded = padded_graph_sizes(step_tokens) if runner.backend.captures_prefill else []
            runner.capture(graph_sizes(config.max_num_seqs), padded)
            # Each capture gave unused memory back to the driver: take it again before others do.
            _run_largest_step(runner, config.max_num_seqs, step_tokens, max_model_len)
            runner.time_steps(_timed_step(config.max_num_seqs, step_tokens, max_model_len))
            stopwatch.lap("CUDA graphs")
    return num_blocks


def _compile(
    runner: ModelRunner,
    calls: Iterable[Callable[[], object]],
    max_num_seqs: int,
    step_tokens: int,
    max_model_len: int,
) -> None:
    """Compile all kernels: those of the largest step, and meanwhile those that `calls` need."""
    # TMA descriptors need a current CUDA context. Where all kernels have been loaded already,
    # nothing else that these threads do makes one current.
    with ThreadPoolExecutor(_COMPILERS, initializer=torch.cuda.synchronize) as pool:
        compiled = [pool.submit(call) for call in calls]
        _run_largest_step(runner, max_num_seqs, step_tokens, max_model_len)
        for each in compiled:
            each.result()
    torch.cuda.empty_cache()  # what follows is measured: alone, and always the same


def _run_largest_step(
    runner: ModelRunner, max_num_seqs: int, step_tokens: int, max_model_len: int
) -> None:
    """Compute as many tokens and sample as many rows as any step will, in the null block.

    What this takes stays in torch's allocator for the steps to come: the KV cache gets the rest.
    All rows want log-probabilities, and the last one is penalised, so that logits are copied and
    the table of seen tokens has all its rows from the start.
    """
    rows = min(max_num_seqs, step_tokens)
    longest = min(max_model_len, step_tokens)
    counts = [min(longest, step_tokens // rows)] * rows
    counts[-1] = min(longest, counts[-1] + step_tokens - sum(counts))
    options: dict[str, Any] = {"logprobs": MAX_LOGPROBS, "seed": 0}
    plan = _prompts(counts, SamplingParams(temperature=1.0, top_p=0.9, top_k=50, **options))
    plan.new_rows[-1].params = SamplingParams(presence_penalty=1.0, **options)
    runner.execute(plan, eager=True).result()


def _timed_step(max_num_seqs: int, step_tokens: int, max_model_len: int) -> StepPlan:
    """Prompts of usual lengths, too many for a graph where a step may have so many."""
    length = min(max_model_len, step_tokens, _TIMED_LENGTH)
    rows = min(max_num_seqs, _TIMED_PROMPTS, step_tokens // length)
    return _prompts([length] * rows, SamplingParams(seed=0))


def _prompts(counts: list[int], params: SamplingParams) -> StepPlan:
    """A step that computes prompts of so many tokens in the null block."""
    rows = len(counts)
    new_rows = [NewRow(row, "", params, [0] * count, count) for row, count in enumerate(counts)]
    return StepPlan(
        0,
        list(range(rows)),
        [0] * rows,
        counts,
        [True] * rows,
        {row: [0] * count for row, count in enumerate(counts)},
        new_rows,
    )
