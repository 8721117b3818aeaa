"""From a decode step's projections to its attention: rotary embedding and cache write by flash-attn
itself, or by this engine's fused kernel before either attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.probes.bench import Bench, Call
from benchmarks.probes.decode_attention import flash_calls, kernel_calls
from benchmarks.probes.flash import MISSING, PAGE, find_flash_attn
from benchmarks.probes.pages import MAX_LEN, PagedSequences, draw_lengths, place
from benchmarks.probes.records import Record, record, skipped
from benchmarks.roofline import Shape
from engine.kernels.rotary_cache import rotate_and_store

_BASE = 1e6

IN_KERNEL = "flash_attn_with_kvcache with rotary_cos, rotary_sin"
THEN_FLASH = "rotate_and_store, flash_attn_with_kvcache"
THEN_KERNEL = "rotate_and_store, decode_attention"


def measure(
    bench: Bench,
    shapes: Mapping[str, Shape],
    *,
    batches: Sequence[int] = (1, 64, 256),
    context: int = 1000,
    page: int = 64,
) -> Iterator[Record]:
    """Every batch, for the first model: flash-attn could not normalise the heads of the other."""
    model, shape = next(iter(shapes.items()))
    flash, table = find_flash_attn(), _angles(shape.head_dim, bench.device)
    if flash is None:
        yield skipped(f"{IN_KERNEL}; {THEN_FLASH}", MISSING)
    for batch in batches:
        lengths = draw_lengths(batch, context)
        sizes = {"model": model, "batch": batch, "tokens": sum(lengths)}
        if flash is not None:
            cached = place(bench, shape, lengths, PAGE)
            calls = _in_kernel(flash, bench, shape, cached, table)
            yield record(IN_KERNEL, sizes | {"page": PAGE}, bench.time(calls))
            attend = flash_calls(flash, bench, shape, cached)
            calls = _fused(bench, shape, cached, table, attend)
            yield record(THEN_FLASH, sizes | {"page": PAGE}, bench.time(calls))
        cached = place(bench, shape, lengths, page)
        calls = _fused(bench, shape, cached, table, kernel_calls(bench, shape, cached))
        yield record(THEN_KERNEL, sizes | {"page": page}, bench.time(calls))


def _angles(head_dim: int, device: torch.device) -> torch.Tensor:
    """Cosines and then sines by position, float32 [MAX_LEN, head_dim]."""
    frequencies = _BASE ** -(torch.arange(0, head_dim, 2, device=device) / head_dim)
    angles = torch.arange(MAX_LEN, device=device)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def _in_kernel(
    flash: Any, bench: Bench, shape: Shape, cached: PagedSequences, table: torch.Tensor
) -> list[Call]:
    """flash-attn rotates the query and the new key, and appends key and value to the cache."""
    qkv = bench.randn(len(cached.seq_lens), 1, shape.heads + 2 * shape.kv_heads, shape.head_dim)
    query, key, value = qkv.split((shape.heads, shape.kv_heads, shape.kv_heads), dim=2)
    cos, sin = (half.contiguous() for half in table.to(bench.dtype).chunk(2, dim=-1))
    keys, values = cached.paged_caches()
    attend = partial(
        flash.flash_attn_with_kvcache,
        query,
        keys,
        values,
        k=key,
        v=value,
        rotary_cos=cos,
        rotary_sin=sin,
        cache_seqlens=cached.seq_lens - 1,
        softmax_scale=shape.head_dim**-0.5,
        causal=True,
        rotary_interleaved=False,
    )
    return [partial(attend, block_table=block_table) for block_table in cached.tables]


def _fused(
    bench: Bench,
    shape: Shape,
    cached: PagedSequences,
    table: torch.Tensor,
    attend: Sequence[Call],
) -> list[Call]:
    """The fused kernel, and then attention; each pair of calls over pages of its own."""
    heads = shape.heads + 2 * shape.kv_heads
    qkv = bench.randn(len(cached.seq_lens), heads * shape.head_dim)
    positions = cached.seq_lens.long() - 1

    def both(slots: torch.Tensor, then: Callable[[], object]) -> None:
        rotate_and_store(qkv, positions, slots, table, cached.caches, shape.heads, None, 0.0)
        then()

    slots = map(cached.last_slots, cached.tables)
    return [partial(both, *pair) for pair in zip(slots, attend, strict=True)]
