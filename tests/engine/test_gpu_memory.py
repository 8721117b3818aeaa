"""The memory that an engine takes of a GPU is what it was allowed, from its start to its end."""

import gc
import json

import pytest
import torch

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import ConfigError
from tests.engine.conftest import TINY_LLAMA, request, run_core
from tests.engine.gpu import needs_gpu

pytestmark = needs_gpu
SIZES = {
    "vocab_size": 32_000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 64,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}
SHARE = 0.4
ROWS, STEP_TOKENS = 512, 16_384


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deep")
    (folder / "config.json").write_text(json.dumps({**TINY_LLAMA, **SIZES}))
    return str(folder)


@pytest.fixture(autouse=True)
def free_gpu():
    """Earlier tests' memory counts as taken until it is given back."""
    give_back()
    yield
    give_back()


def give_back():
    gc.collect()
    torch.cuda.empty_cache()


def start(model, **options):
    defaults = {"device": "cuda", "load_format": "dummy", "gpu_memory_utilization": SHARE}
    return EngineCore(EngineConfig(model=model, **{**defaults, **options}))


def share_of_allowance():
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / (SHARE * total)


def run_prompts(core, count, length, **params):
    params = {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "max_tokens": 3, **params}
    wires = (
        request(f"r{i}", [(i + j) % 1000 for j in range(length)], **{**params, "seed": i})
        for i in range(count)
    )
    run_core(core, wires)


@pytest.mark.parametrize(
    "options",
    [{}, {"enforce_eager": True}, {"attention_backend": "flash_attn"}, {"kvcache_block_size": 16}],
    ids=["graphs", "eager", "flash-attn", "small blocks"],
)
def test_memory_is_what_is_allowed(deep_model, options):
    if options.get("attention_backend") == "flash_attn":
        pytest.importorskip("flash_attn")
    core = start(deep_model, max_num_seqs=ROWS, max_num_batched_tokens=STEP_TOKENS, **options)
    assert 0.97 <= share_of_allowance() <= 1
    run_prompts(core, ROWS, STEP_TOKENS // ROWS)  # one full prefill, and decodes of all rows
    assert 0.97 <= share_of_allowance() <= 1
    run_prompts(core, 2 * STEP_TOKENS // 4000, 4000)
    assert 0.97 <= share_of_allowance() <= 1


def test_log_probabilities_and_penalties_stay_within_the_allowance(deep_model):
    core = start(deep_model, max_num_seqs=ROWS, max_num_batched_tokens=STEP_TOKENS)
    run_prompts(core, ROWS, 32, logprobs=5, repetition_penalty=1.1, presence_penalty=0.5)
    run_prompts(core, 4, 4000, prompt_logprobs=5)
    assert 0.97 <= share_of_allowance() <= 1


def test_an_allowance_that_others_have_used_up_is_refused(deep_model):
    _, total = torch.cuda.mem_get_info()
    held = torch.empty(int(0.2 * total), dtype=torch.uint8, device="cuda")
    with pytest.raises(ConfigError, match="gpu_memory_utilization"):
        start(deep_model, gpu_memory_utilization=0.1)
    del held


@pytest.mark.parametrize("option", ["kv_cache_memory_bytes", "num_kvcache_blocks"])
def test_a_cache_larger_than_the_gpu_is_refused_before_serving(deep_model, option):
    with pytest.raises(ConfigError, match=option):
        start(deep_model, **{option: 10**13 if option == "kv_cache_memory_bytes" else 10**7})


def test_the_next_engine_gets_the_memory_of_the_last(deep_model):
    first = start(deep_model, max_num_seqs=32)
    blocks = first.info.num_blocks
    del first
    give_back()
    assert start(deep_model, max_num_seqs=32).info.num_blocks == pytest.approx(blocks, rel=0.01)
