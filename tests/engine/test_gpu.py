"""The engine on a GPU: attention against float64, and the same tokens as on the CPU."""

import itertools

import pytest
import torch

from engine.attention import select_backend
from engine.core import EngineCore
from tests.engine.conftest import request, run_core, tiny_config
from tests.engine.paging import attention_batch
from tests.engine.test_attention import BATCHES, reference
from tests.engine.test_core import GREEDY, SEEDED, WAYS, prompts, requests

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]


def paged_attention(name):
    if name == "flash_attn":
        pytest.importorskip("flash_attn")
    return select_backend(name, torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(14, 2, 64), (28, 4, 128), (8, 2, 256)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "size"), [("flash_attn", 256), ("triton", 16), ("triton", 256)])
def test_attention_against_float64(batch, window, heads, kv_heads, head_dim, dtype, name, size):
    if name == "flash_attn" and head_dim == 256 and dtype == torch.float16:
        pytest.skip("not in the build of flash-attn on the test host")
    backend, rows = paged_attention(name), BATCHES[batch]
    torch.manual_seed(0)
    cache = torch.randn(
        backend.kv_cache_shape(65, size, kv_heads, head_dim), dtype=dtype, device="cuda"
    )
    tables = (torch.randperm(64) + 1).view(8, 8).int()
    total = sum(count for _, count, _ in rows)
    query = torch.randn(total, heads, head_dim, dtype=dtype, device="cuda")
    key, value = torch.randn(2, total, kv_heads, head_dim, dtype=dtype, device="cuda")
    layout = attention_batch(rows, tables, size)
    for field in ("block_table", "slot_mapping", "device_seq_lens", "query_starts", "key_starts"):
        setattr(layout, field, getattr(layout, field).cuda())
    for slots, new in zip(backend.slots(cache), (key, value), strict=True):
        slots[layout.slot_mapping] = new
    metadata = backend.prepare(layout)
    output = backend.attend(query, cache, metadata, head_dim**-0.5, window)
    ends = list(itertools.accumulate((count for _, count, _ in rows), initial=0))
    for (row, count, start), first, last in zip(rows, ends, ends[1:], strict=False):
        pages = cache[:, tables[row].cuda().long()].flatten(1, 2)[:, : start + count].cpu()
        wanted = reference(query[first:last].cpu(), *pages, start, window)
        error = (output[first:last].cpu() - wanted).norm() / wanted.norm()
        assert error < 1e-2


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["greedy", "seeded"])
def test_same_tokens_every_way(tiny_checkpoint, on_cpu_alone, kind, way):
    options = {"device": "cuda", "dtype": "float32", "load_format": "auto", **WAYS[way]}
    core = EngineCore(tiny_config(tiny_checkpoint, **options))
    assert run_core(core, requests(GREEDY if kind == "greedy" else SEEDED)) == on_cpu_alone[kind]


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory):
    """A tiny random model as a checkpoint, so that CPU and GPU run the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.engine.conftest import TINY_LLAMA

    torch.manual_seed(0)
    sizes = {k: v for k, v in TINY_LLAMA.items() if k not in ("architectures", "torch_dtype")}
    folder = tmp_path_factory.mktemp("checkpoint")
    LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def on_cpu_alone(tiny_checkpoint):
    """Each request by itself on the CPU."""
    core = EngineCore(
        tiny_config(tiny_checkpoint, device="cpu", load_format="auto", max_num_seqs=1)
    )
    return {
        kind: run_core(core, requests(params))
        for kind, params in (("greedy", GREEDY), ("seeded", SEEDED))
    }


def test_flash_logprobs_are_close_to_float32(tiny_model_64):
    """Until greedy tokens part, logprobs agree; where they part, both are likely (vLLM)."""
    pytest.importorskip("flash_attn")
    full = logprobs(tiny_model_64, dtype="float32", device="cpu")
    half = logprobs(tiny_model_64, dtype="bfloat16", device="cuda", kvcache_block_size=None)
    compared = 0
    for name in full:
        for a, b in zip(full[name], half[name], strict=True):
            assert a.token_ids[0] in b.token_ids[1:]
            assert b.token_ids[0] in a.token_ids[1:]
            if a.token_ids[0] != b.token_ids[0]:
                break
            assert a.logprobs[0] == pytest.approx(b.logprobs[0], abs=0.15)
            compared += 1
    assert compared > 50


@pytest.fixture(scope="module")
def tiny_model_64(tmp_path_factory):
    """A tiny checkpoint with heads of 64, as flash-attn wants them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.06,
    )
    folder = tmp_path_factory.mktemp("heads-of-64")
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def logprobs(model, **options):
    options = {"load_format": "auto", "num_kvcache_blocks": 256, **options}
    core = EngineCore(tiny_config(model, **options))
    entries = {}
    for i, prompt in enumerate(prompts()):
        entries[f"r{i}"] = []
        core.add(request(f"r{i}", prompt, logprobs=8))
    while core.has_work:
        for delta in core.step():
            entries[delta.request_id] += delta.logprobs or []
    return entries
