"""Paged attention on torch against a float64 reference, on random pages."""

import itertools
import random

import pytest
import torch

from engine.attention import select_backend
from engine.attention.torch_sdpa import TorchAttention
from engine.errors import ConfigError
from tests.engine.paging import attention_batch

HEAD_DIM = 32
BATCHES = {
    "decodes of one length": [(i, 1, 99) for i in range(6)],
    "decodes of very different lengths": [(0, 1, 0), (1, 1, 400), (2, 1, 3), (3, 1, 30), (4, 1, 7)],
    "prefills": [(0, 20, 0), (1, 300, 0)],
    "chunks over a prefix": [(0, 5, 100), (1, 64, 16), (2, 33, 1)],
    "mixed": [(0, 1, 50), (1, 1, 449), (2, 40, 0), (3, 17, 200)],
}


def reference(query, keys, values, start, window):
    """float64: query [n, heads, d], keys and values [start + n, kv heads, d]."""
    shared = query.shape[1] // keys.shape[1]
    q, k, v = (x.double() for x in (query, keys, values))
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * query.shape[-1] ** -0.5
    at, positions = torch.arange(len(k)), torch.arange(start, start + len(q))[:, None]
    seen = at <= positions
    if window is not None:
        seen &= at > positions - window
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize(("block_size", "heads", "kv_heads"), [(16, 6, 2), (256, 4, 4), (16, 4, 1)])
def test_against_float64(batch, window, block_size, heads, kv_heads):
    torch.manual_seed(0)
    rows = BATCHES[batch]
    backend = TorchAttention()
    shape = backend.kv_cache_shape(8 * 32 + 1, block_size, kv_heads, HEAD_DIM)
    cache = torch.randn(shape)
    tables = (torch.randperm(8 * 32) + 1).view(8, 32).int()
    context = {row: torch.randn(2, start, kv_heads, HEAD_DIM) for row, _, start in rows}
    for row, kept in context.items():
        for position in range(kept.shape[1]):
            block = int(tables[row, position // block_size])
            cache[block, position % block_size] = kept[:, position]
    total = sum(count for _, count, _ in rows)
    query = torch.randn(total, heads, HEAD_DIM)
    key, value = torch.randn(2, total, kv_heads, HEAD_DIM)
    layout = attention_batch(rows, tables, block_size)
    for slots, new in zip(backend.slots(cache), (key, value), strict=True):
        slots[layout.slot_mapping] = new
    metadata = backend.prepare(layout)
    for _ in range(2):  # a second layer shares the step's metadata
        output = backend.attend(query, cache, metadata, HEAD_DIM**-0.5, window)
    ends = list(itertools.accumulate((count for _, count, _ in rows), initial=0))
    for (row, _, start), first, last in zip(rows, ends, ends[1:], strict=False):
        keys = torch.cat([context[row][0], key[first:last]])
        values = torch.cat([context[row][1], value[first:last]])
        wanted = reference(query[first:last], keys, values, start, window)
        error = (output[first:last] - wanted).norm() / wanted.norm()
        assert error < 1e-5


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
    assert isinstance(select_backend("auto", cpu, torch.float32), TorchAttention)
    with pytest.raises(ConfigError, match="GPU"):
        select_backend("flash_attn", cpu, torch.float32)
