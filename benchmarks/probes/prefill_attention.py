"""Attention of many new tokens a sequence: flash-attn beside this engine's kernel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.probes.bench import Bench, Call
from benchmarks.probes.flash import MISSING, PAGE, find_flash_attn
from benchmarks.probes.pages import PagedSequences, place
from benchmarks.probes.records import Record, record, skipped
from benchmarks.roofline import Shape
from engine.kernels.prefill_attention import prefill_attention

_TILE = 64
"""Queries in a tile."""
CASES = ((16, 1024, 0), (51, 320, 0), (4, 4096, 0), (8, 512, 1536))
"""Sequences, new tokens of each, and tokens of each that are cached already."""


def measure(
    bench: Bench,
    shapes: Mapping[str, Shape],
    *,
    cases: Sequence[tuple[int, int, int]] = CASES,
    page: int = 64,
) -> Iterator[Record]:
    """Every model and case. FLOPs are those of the keys that a token sees."""
    flash = find_flash_attn()
    if flash is None:
        yield skipped("flash_attn_varlen_func", MISSING)
    for model, shape in shapes.items():
        for count, new, prefix in cases:
            sizes = {"model": model, "sequences": count, "new": new, "prefix": prefix}
            pairs = count * (new * prefix + new * (new + 1) // 2)
            flops = 4 * shape.heads * shape.head_dim * pairs
            lengths = [prefix + new] * count
            if flash is not None:
                cached = place(bench, shape, lengths, PAGE)
                time = bench.time(_flash_calls(flash, bench, shape, cached, new))
                yield record("flash_attn_varlen_func", sizes | {"page": PAGE}, time, flops=flops)
            cached = place(bench, shape, lengths, page)
            time = bench.time(_kernel_calls(bench, shape, cached, new))
            yield record("prefill_attention", sizes | {"page": page}, time, flops=flops)


def _flash_calls(
    flash: Any, bench: Bench, shape: Shape, cached: PagedSequences, new: int
) -> list[Call]:
    keys, values = cached.paged_caches()
    count, length = len(cached.seq_lens), int(cached.seq_lens[0])
    attend = partial(
        flash.flash_attn_varlen_func,
        bench.randn(count * new, shape.heads, shape.head_dim),
        keys,
        values,
        cu_seqlens_q=_starts(count, new, bench.device),
        cu_seqlens_k=_starts(count, length, bench.device),
        max_seqlen_q=new,
        max_seqlen_k=length,
        softmax_scale=shape.head_dim**-0.5,
        causal=True,
    )
    return [partial(attend, block_table=table) for table in cached.tables]


def _kernel_calls(bench: Bench, shape: Shape, cached: PagedSequences, new: int) -> list[Call]:
    count, scale = len(cached.seq_lens), shape.head_dim**-0.5
    query = bench.randn(count * new, shape.heads, shape.head_dim)
    tiles = _tiles(count, new, int(cached.seq_lens[0]) - new).to(bench.device)
    out = torch.empty_like(query)
    return [
        partial(
            prefill_attention,
            query, cached.caches, table, tiles, _TILE, cached.page, scale, None, out,
        )
        for table in cached.tables
    ]  # fmt: skip


def _tiles(count: int, new: int, prefix: int) -> torch.Tensor:
    """The queries in tiles, as the kernel takes them, int32 [tiles, 4]."""
    entries = [
        (row, row * new + first, min(_TILE, new - first), prefix + first)
        for first in reversed(range(0, new, _TILE))
        for row in range(count)
    ]
    return torch.tensor(entries, dtype=torch.int32)


def _starts(count: int, step: int, device: torch.device) -> torch.Tensor:
    """0, step, … and the end, int32 [count + 1]."""
    return torch.arange(count + 1, dtype=torch.int32, device=device) * step
