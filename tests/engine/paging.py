"""Runs a model over a paged cache whose pages lie in random order."""

import itertools
import math

import torch

from engine.attention.backend import AttentionBatch
from engine.attention.torch_sdpa import TorchAttention

MAX_BLOCKS = 32


def attention_batch(rows, tables, block_size: int) -> AttentionBatch:
    """Rows are (table index, tokens computed, first position), those of one token first."""
    lens = [start + count for _, count, start in rows]
    slots = [
        int(tables[row, p // block_size]) * block_size + p % block_size
        for row, count, start in rows
        for p in range(start, start + count)
    ]
    width = math.ceil(max(lens) / block_size)
    return AttentionBatch(
        num_decodes=sum(count == 1 for _, count, _ in rows),
        query_lens=[count for _, count, _ in rows],
        seq_lens=lens,
        block_table=tables[[row for row, _, _ in rows], :width],
        slot_mapping=torch.tensor(slots),
        block_size=block_size,
        device_seq_lens=torch.tensor(lens, dtype=torch.int32),
        query_starts=starts([count for _, count, _ in rows if count > 1]),
        key_starts=starts([start + count for _, count, start in rows if count > 1]),
    )


def starts(lengths) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


class PagedModel:
    """A model, its cache, and up to 8 sequences."""

    def __init__(self, shape, model, block_size: int, seed: int) -> None:
        self.model, self.block_size = model, block_size
        self.backend = TorchAttention()
        cache = self.backend.kv_cache_shape(
            8 * MAX_BLOCKS + 1, block_size, shape.num_kv_heads, shape.head_dim
        )
        self.kv_caches = [torch.randn(cache) for _ in range(shape.num_layers)]
        shuffled = torch.randperm(8 * MAX_BLOCKS, generator=torch.Generator().manual_seed(seed)) + 1
        self.tables = shuffled.view(8, MAX_BLOCKS).int()

    def step(self, rows) -> torch.Tensor:
        """Logits of all tokens of `rows`: (sequence, token ids, first position)."""
        rows = sorted(rows, key=lambda row: len(row[1]) > 1)
        batch = attention_batch(
            [(row, len(ids), start) for row, ids, start in rows], self.tables, self.block_size
        )
        token_ids = torch.tensor([i for _, ids, _ in rows for i in ids])
        positions = torch.tensor([s + i for _, ids, s in rows for i in range(len(ids))])
        metadata = self.backend.prepare(batch)
        hidden = self.model(
            token_ids, positions, batch.slot_mapping, self.kv_caches, self.backend, metadata
        )
        return self.model.compute_logits(hidden)
