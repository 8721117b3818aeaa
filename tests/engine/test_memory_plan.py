"""What an engine would take of a device, before anything is loaded."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from engine import ConfigError, EngineConfig, plan_memory
from engine.gguf_header import read_gguf_header
from engine.model_source import resolve_model
from engine.runner.build import build_runner
from engine.startup import Stopwatch

QWEN = str(Path(__file__).parents[2] / "benchmarks" / "shapes" / "qwen2.5-7b")
QWEN_PARAMETERS = 7_615_616_512
"""As the model's card has it: 7.61 billion."""
GIB = 2**30


def test_plan_is_what_an_engine_settles_on():
    config = EngineConfig(max_num_seqs=4, kv_cache_memory_bytes=64 * 2**20, max_model_len=300)
    plan = plan_memory(config)
    _, info = build_runner(config, Stopwatch())
    assert (plan.num_blocks, plan.block_size) == (info.num_blocks, info.block_size)
    assert (plan.device, plan.dtype) == (info.device, info.dtype)
    assert plan.max_model_len == info.max_model_len == 300
    assert plan.num_full_sequences == (plan.num_blocks - 1) // math.ceil(300 / plan.block_size)
    tensors = read_gguf_header(resolve_model(config.model).path).tensors.values()
    assert plan.weight_bytes == sum(math.prod(tensor.shape) for tensor in tensors) * 4


def test_plan_for_a_gpu_that_is_not_here():
    pytest.importorskip("triton")
    config = EngineConfig(model=QWEN, load_format="dummy", gpu_memory_utilization=0.5)
    plan = plan_memory(config, 80 * GIB)
    assert (plan.device, plan.dtype) == ("cuda", "bfloat16")
    assert plan.weight_bytes == 2 * QWEN_PARAMETERS
    block_bytes = 2 * 28 * 4 * 128 * 2 * plan.block_size
    assert plan.cache_bytes == plan.num_blocks * block_bytes
    left = 40 * GIB - plan.weight_bytes - plan.cache_bytes
    assert 0.5 * GIB <= left < 0.5 * GIB + block_bytes


def test_ranks_share_weights_and_cache():
    pytest.importorskip("triton")
    options = {"model": QWEN, "load_format": "dummy", "dtype": "bfloat16"}
    alone, half = (
        plan_memory(EngineConfig(**options, tensor_parallel_size=size), 40 * GIB) for size in (1, 2)
    )
    assert alone.weight_bytes / 2 < half.weight_bytes < 0.6 * alone.weight_bytes  # one embedding
    assert half.num_blocks > 2 * alone.num_blocks


@pytest.mark.parametrize(
    ("options", "gpu_gib", "words"),
    [
        ({}, 16, "room for 0 tokens"),
        ({"max_model_len": 40_000}, 80, "model was made for"),
        ({"tensor_parallel_size": 3}, 80, "tensor_parallel_size"),
        ({"model": "nowhere"}, 80, "was not found"),
    ],
)
def test_what_would_not_start_is_refused(options, gpu_gib, words):
    pytest.importorskip("triton")
    config = EngineConfig(**{"model": QWEN, "load_format": "dummy", **options})
    with pytest.raises(ConfigError, match=words):
        plan_memory(config, gpu_gib * GIB)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_must_be_here_or_be_told_of():
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        plan_memory(EngineConfig(device="cuda"))
