"""Caches whose pages lie in random order: attention over them, and models that use them."""

import dataclasses
import itertools
import math

import numpy as np
import torch
from torch.nn.functional import pad

from engine.attention.backend import AttentionBatch
from engine.attention.spans import SpanPlan
from engine.attention.torch_sdpa import TorchAttention

MAX_BLOCKS = 32
BATCHES = {
    "decodes of one length": [(i, 1, 99) for i in range(6)],
    "decodes of very different lengths": [(0, 1, 0), (1, 1, 400), (2, 1, 3), (3, 1, 30), (4, 1, 7)],
    "prefills": [(0, 20, 0), (1, 300, 0)],
    "chunks over a prefix": [(0, 5, 100), (1, 64, 16), (2, 33, 1)],
    "mixed": [(0, 1, 50), (1, 1, 449), (2, 40, 0), (3, 17, 200)],
}
"""Rows of a step: (sequence, tokens computed, first position), those of one token first."""


def random_tables(num_rows: int, max_len: int, block_size: int) -> torch.Tensor:
    """Block tables for `num_rows` sequences, int32; no two hold the same block, none block 0."""
    width = math.ceil(max_len / block_size)
    return (torch.randperm(num_rows * width) + 1).view(num_rows, width).int()


def attention_batch(
    rows, tables, block_size: int, device="cpu", spans_at_a_time: int = 0
) -> AttentionBatch:
    lens = [start + count for _, count, start in rows]
    slots = [
        int(tables[row, p // block_size]) * block_size + p % block_size
        for row, count, start in rows
        for p in range(start, start + count)
    ]
    width = math.ceil(max(lens) / block_size)
    num_decodes = sum(count == 1 for _, count, _ in rows)
    found = tiles([(count, start) for _, count, start in rows])
    return AttentionBatch(
        num_decodes=num_decodes,
        query_lens=[count for _, count, _ in rows],
        seq_lens=lens,
        block_table=tables[[row for row, _, _ in rows], :width].to(device),
        slot_mapping=torch.tensor(slots, device=device),
        block_size=block_size,
        decode_lens=torch.tensor(lens[:num_decodes], dtype=torch.int32, device=device),
        query_starts=starts([count for _, count, _ in rows if count > 1]).to(device),
        key_starts=starts([start + count for _, count, start in rows if count > 1]).to(device),
        spans=decode_spans(lens[:num_decodes], spans_at_a_time).to(device),
        tiles=found.to(device),
        num_tiles=torch.tensor([len(found)], dtype=torch.int32, device=device),
    )


def decode_spans(lengths, at_a_time: int) -> torch.Tensor:
    return torch.from_numpy(SpanPlan(at_a_time).divide(np.array(lengths, dtype=np.int64)))


def starts(lengths) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def padded(batch: AttentionBatch, num_rows: int) -> AttentionBatch:
    """The batch as a graph gets it, with rows of padding that compute nothing."""
    decodes, missing = batch.num_decodes, num_rows - len(batch.seq_lens)
    return dataclasses.replace(
        batch,
        num_decodes=num_rows,
        block_table=pad(batch.block_table, (0, 0, 0, missing)),
        decode_lens=pad(batch.decode_lens, (0, num_rows - decodes)),
        spans=torch.cat([batch.spans, batch.spans.new_tensor([[0, 0, 1, 0]] * missing)]),
        tiles=pad(batch.tiles, (0, 0, 0, 3), value=1),
        padded=True,
    )


def tiles(rows) -> torch.Tensor:
    """Tiles of 64 queries of the rows (tokens computed, first position) of several tokens."""
    found, first = [], 0
    for row, (count, start) in enumerate(rows):
        if count > 1:
            found += [
                (row, first + at, min(64, count - at), start + at) for at in range(0, count, 64)
            ]
        first += count
    return torch.tensor(found, dtype=torch.int32).view(-1, 4)


def attend_in_float64(query, keys, values, window=None):
    """Query [n, heads, d] over keys and values [n or more, kv heads, d], the ends aligned."""
    shared, start = query.shape[1] // keys.shape[1], len(keys) - len(query)
    q, k, v = (x.cpu().double() for x in (query, keys, values))
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * query.shape[-1] ** -0.5
    at, positions = torch.arange(len(k)), torch.arange(start, start + len(q))[:, None]
    seen = at <= positions
    if window is not None:
        seen &= at > positions - window
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


class RandomStep:
    """Queries of a step, and one layer's cache with random keys and values in every slot."""

    def __init__(
        self,
        backend,
        rows,
        block_size,
        heads,
        kv_heads,
        head_dim,
        dtype=torch.float32,
        device="cpu",
    ) -> None:
        generator = torch.manual_seed(0)
        lens = [start + count for _, count, start in rows]
        self.backend, self.rows, self.scale = backend, rows, head_dim**-0.5
        self.tables = random_tables(1 + max(row for row, _, _ in rows), max(lens), block_size)
        at_a_time = backend.spans_at_a_time(kv_heads, torch.device(device))
        self.layout = attention_batch(rows, self.tables, block_size, device, at_a_time)
        shape = backend.kv_cache_shape(self.tables.numel() + 1, block_size, kv_heads, head_dim)
        self.cache = torch.randn(shape, generator=generator).to(device, dtype)
        # As the model gives them: a part of what the merged projection made.
        merged = (sum(self.layout.query_lens), heads + 2 * kv_heads, head_dim)
        self.query = torch.randn(merged, generator=generator).to(device, dtype)[:, :heads]

    def attend(self, window=None) -> torch.Tensor:
        """As the layers of a model do: metadata is shared by several."""
        metadata = self.backend.prepare(self.layout)
        first, second = (
            self.backend.attend(self.query, self.cache, metadata, self.scale, window)
            for _ in range(2)
        )
        assert torch.equal(first, second)
        return first

    def error(self, output, window=None) -> float:
        """Distance from float64, relative to its length, of the worst row."""
        block_size, errors, first = self.layout.block_size, [], 0
        keys, values = self.backend.slots(self.cache)
        for row, count, start in self.rows:
            positions = torch.arange(start + count)
            slots = self.tables[row, positions // block_size] * block_size + positions % block_size
            tokens, slots = slice(first, first + count), slots.to(keys.device)
            wanted = attend_in_float64(self.query[tokens], keys[slots], values[slots], window)
            errors.append((output[tokens].cpu().double() - wanted).norm() / wanted.norm())
            first += count
        return max(errors).item()


class PagedModel:
    """A model, its cache, and up to 8 sequences."""

    def __init__(self, shape, model, block_size: int, seed: int, backend=None) -> None:
        self.model, self.block_size = model, block_size
        self.backend = backend or TorchAttention()
        cache = self.backend.kv_cache_shape(
            8 * MAX_BLOCKS + 1, block_size, shape.num_kv_heads, shape.head_dim
        )
        self.kv_caches = [torch.randn(cache) for _ in range(shape.num_layers)]
        self.at_a_time = self.backend.spans_at_a_time(shape.num_kv_heads, torch.device("cpu"))
        shuffled = torch.randperm(8 * MAX_BLOCKS, generator=torch.Generator().manual_seed(seed)) + 1
        self.tables = shuffled.view(8, MAX_BLOCKS).int()

    def step(self, rows, wanted=None) -> torch.Tensor:
        """Logits of the tokens of `rows`: (sequence, token ids, first position).

        All tokens', or of those whose places among them `wanted` lists.
        """
        rows = sorted(rows, key=lambda row: len(row[1]) > 1)
        batch = attention_batch(
            [(row, len(ids), start) for row, ids, start in rows],
            self.tables,
            self.block_size,
            spans_at_a_time=self.at_a_time,
        )
        token_ids = torch.tensor([i for _, ids, _ in rows for i in ids])
        positions = torch.tensor([s + i for _, ids, s in rows for i in range(len(ids))])
        metadata = self.backend.prepare(batch)
        hidden = self.model(
            token_ids,
            positions,
            batch.slot_mapping,
            self.kv_caches,
            self.backend,
            metadata,
            None if wanted is None else torch.tensor(wanted),
        )
        return self.model.compute_logits(hidden)
