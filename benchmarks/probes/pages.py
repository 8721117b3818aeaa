"""Sequences in a paged cache, as often as a measurement needs distinct ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.probes.bench import Bench
from benchmarks.roofline import Shape
from engine.attention.spans import SpanPlan

MAX_LEN = 4096
"""Tokens that a block table has room for."""


@dataclass
class PagedSequences:
    """Random keys and values of a batch of sequences, in pages that lie in random order."""

    page: int
    caches: tuple[torch.Tensor, torch.Tensor]
    """Keys and values, each [slots, kv heads, head_dim]."""
    tables: list[torch.Tensor]
    """Block tables that share no page, int32 [sequences, MAX_LEN / page] each."""
    seq_lens: torch.Tensor
    """int32 [sequences]."""

    def paged_caches(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each [pages, page, kv heads, head_dim]."""
        keys, values = (cache.unflatten(0, (-1, self.page)) for cache in self.caches)
        return keys, values

    def last_slots(self, table: torch.Tensor) -> torch.Tensor:
        """Cache slot of each sequence's last token, int64 [sequences]."""
        last = self.seq_lens.long() - 1
        return table.gather(1, (last // self.page)[:, None])[:, 0] * self.page + last % self.page

    def spans(self, at_a_time: int) -> torch.Tensor:
        """See `AttentionBatch.spans`."""
        found = SpanPlan(at_a_time).divide(self.seq_lens.cpu().long().numpy())
        return torch.from_numpy(found).to(self.seq_lens.device)


def place(bench: Bench, shape: Shape, lengths: Sequence[int], page: int) -> PagedSequences:
    """Give the sequences pages, in enough copies that their keys outgrow the L2 cache."""
    copies = bench.copies(kv_bytes(shape, lengths))
    needed = [-(-length // page) for length in lengths]
    total = copies * sum(needed)
    free = iter((torch.randperm(total) + 1).split(needed * copies))  # page 0 pads the tables
    tables = torch.zeros(copies, len(lengths), -(-MAX_LEN // page), dtype=torch.int32)
    for table in tables:
        for row in table:
            pages = next(free)
            row[: len(pages)] = pages
    size = ((total + 1) * page, shape.kv_heads, shape.head_dim)
    return PagedSequences(
        page,
        (bench.randn(*size), bench.randn(*size)),
        list(tables.to(bench.device)),
        torch.tensor(lengths, dtype=torch.int32, device=bench.device),
    )


def kv_bytes(shape: Shape, lengths: Sequence[int]) -> int:
    """Bytes of one layer's keys and values of these sequences."""
    return sum(lengths) * shape.kv_bytes // shape.layers


def draw_lengths(batch: int, mean: int, seed: int = 0) -> list[int]:
    """Lengths from half the mean to one and a half of it, uniformly; the same at every call."""
    draw = random.Random(seed)
    return [draw.randint(mean // 2, mean + mean // 2) for _ in range(batch)]
