"""Paged attention on torch against a float64 reference, on random pages."""

import random
import sys
from types import SimpleNamespace

import pytest
import torch

from engine.attention import select_backend
from engine.attention.cuda_paged import CudaPagedAttention
from engine.attention.torch_sdpa import TorchAttention
from engine.errors import ConfigError
from tests.engine.paging import BATCHES, RandomStep, attention_batch


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize(("block_size", "heads", "kv_heads"), [(16, 6, 2), (256, 4, 4), (16, 4, 1)])
def test_against_float64(batch, window, block_size, heads, kv_heads):
    step = RandomStep(TorchAttention(), BATCHES[batch], block_size, heads, kv_heads, 32)
    assert step.error(step.attend(window), window) < 1e-5


def test_slots_and_pages_are_the_same_memory():
    """`slots` writes what `attend` reads, and nothing else."""
    rows = BATCHES["mixed"]
    step = RandomStep(TorchAttention(), rows, 16, 4, 2, 32)
    before, metadata = step.cache.clone(), step.backend.prepare(step.layout)
    for slots in step.backend.slots(step.cache):
        slots[step.layout.slot_mapping] = torch.randn(len(step.query), 2, 32)
    assert (step.cache != before).any(-1).sum() == 2 * 2 * len(step.query)
    output = step.backend.attend(step.query, step.cache, metadata, step.scale)
    assert step.error(output) < 1e-5


def test_skewed_decodes_are_read_in_groups():
    rows = [(i, 1, random.Random(i).randint(1, 40)) for i in range(7)] + [(7, 1, 500)]
    tables = torch.arange(1, 257).view(8, 32).int()
    metadata = TorchAttention().prepare(attention_batch(rows, tables, 16))
    read = sum(len(group.blocks) for group in metadata.decodes)
    needed = sum(-(-(start + 1) // 16) for _, _, start in rows)
    assert len(metadata.decodes) > 1
    assert read <= 2 * needed


def test_groups_are_bounded(monkeypatch):
    monkeypatch.setattr("engine.attention.torch_sdpa._GROUP_TOKENS", 300)
    rows = [(i, 1, 99) for i in range(8)]
    tables = torch.arange(1, 257).view(8, 32).int()
    metadata = TorchAttention().prepare(attention_batch(rows, tables, 16))
    assert [group.size for group in metadata.decodes] == [3, 3, 2]
    assert torch.cat([group.rows for group in metadata.decodes]).sort().values.tolist() == [
        *range(8)
    ]


def test_choice():
    cpu = torch.device("cpu")
    assert isinstance(select_backend("auto", cpu, torch.float32, 64), TorchAttention)
    for name in ("flash_attn", "triton"):
        with pytest.raises(ConfigError, match="GPU"):
            select_backend(name, cpu, torch.float32, 64)


@pytest.fixture
def ampere(monkeypatch):
    """Pretend that there is an A100, with flash-attn and Triton."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    return torch.device("cuda")


@pytest.mark.parametrize(
    ("dtype", "head_dim", "block_size", "words"),
    [
        (torch.float32, 64, None, "dtype bfloat16 or float16, not float32"),
        (torch.bfloat16, 320, None, "heads of at most 256, .* not of 320"),
        (torch.float16, 20, None, "multiples of 8"),
        (torch.bfloat16, 64, 64, "kvcache_block_size .* multiple of 256, not 64"),
        (torch.bfloat16, 64, 384, "kvcache_block_size .* multiple of 256, not 384"),
    ],
)
def test_flash_attn_refuses_what_its_kernels_do_not_take(
    ampere, caplog, dtype, head_dim, block_size, words
):
    with pytest.raises(ConfigError, match=f"{words}.* set attention_backend to 'auto'"):
        select_backend("flash_attn", ampere, dtype, head_dim, block_size)
    with caplog.at_level("INFO", logger="trunkline.engine"):
        assert isinstance(
            select_backend("auto", ampere, dtype, head_dim, block_size), CudaPagedAttention
        )
    assert "attention backend: triton" in caplog.text


def test_flash_attn_needs_an_ampere_and_its_package(ampere, monkeypatch):
    with monkeypatch.context() as before_ampere:
        before_ampere.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        with pytest.raises(ConfigError, match="compute capability"):
            select_backend("flash_attn", ampere, torch.float16, 64)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="not installed"):
        select_backend("flash_attn", ampere, torch.float16, 64)


@pytest.mark.parametrize(("head_dim", "block_size"), [(64, None), (256, 256), (8, 512)])
def test_flash_attn_takes_what_its_kernels_do(ampere, monkeypatch, head_dim, block_size):
    module = SimpleNamespace(FlashAttention=lambda: "flash")
    monkeypatch.setitem(sys.modules, "engine.attention.flash_attn", module)
    assert select_backend("flash_attn", ampere, torch.bfloat16, head_dim, block_size) == "flash"
