"""Attention of one new token a sequence: flash-attn beside this engine's kernel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.probes.bench import Bench, Call
from benchmarks.probes.flash import MISSING, PAGE, find_flash_attn
from benchmarks.probes.pages import PagedSequences, draw_lengths, kv_bytes, place
from benchmarks.probes.records import Record, record, skipped
from benchmarks.roofline import Shape
from engine.kernels.decode_attention import decode_attention, spans_at_a_time


def measure(
    bench: Bench,
    shapes: Mapping[str, Shape],
    *,
    batches: Sequence[int] = (1, 16, 64, 256),
    contexts: Sequence[int] = (450, 1000),
    pages: Sequence[int] = (64, 16),
    uneven: Sequence[int] = (4000, 2000, *30 * (450,)),
) -> Iterator[Record]:
    """Every model, mean context and batch, and a batch of the lengths `uneven`, if any.

    Bytes are those of the keys and values.
    """
    flash = find_flash_attn()
    if flash is None:
        yield skipped("flash_attn_with_kvcache", MISSING)
    cases = [draw_lengths(batch, context) for context in contexts for batch in batches]
    for model, shape in shapes.items():
        for lengths in [*cases, list(uneven)] if uneven else cases:
            sizes = {"model": model, "batch": len(lengths), "tokens": sum(lengths)}
            sizes["longest"] = max(lengths)
            moved = kv_bytes(shape, lengths)
            if flash is not None:
                calls = flash_calls(flash, bench, shape, place(bench, shape, lengths, PAGE))
                entry = sizes | {"page": PAGE}
                time = bench.time(calls)
                yield record("flash_attn_with_kvcache", entry, time, nbytes=moved)
            for page in pages:
                calls = kernel_calls(bench, shape, place(bench, shape, lengths, page))
                entry = sizes | {"page": page}
                yield record("decode_attention", entry, bench.time(calls), nbytes=moved)


def flash_calls(flash: Any, bench: Bench, shape: Shape, cached: PagedSequences) -> list[Call]:
    """One call of flash-attn for each block table."""
    query = bench.randn(len(cached.seq_lens), 1, shape.heads, shape.head_dim)
    keys, values = cached.paged_caches()
    attend = partial(
        flash.flash_attn_with_kvcache,
        query,
        keys,
        values,
        cache_seqlens=cached.seq_lens,
        softmax_scale=shape.head_dim**-0.5,
        causal=True,
    )
    return [partial(attend, block_table=table) for table in cached.tables]


def kernel_calls(bench: Bench, shape: Shape, cached: PagedSequences) -> list[Call]:
    """One call of this engine's kernel for each block table."""
    query = bench.randn(len(cached.seq_lens), shape.heads, shape.head_dim)
    scale, out = shape.head_dim**-0.5, query.new_empty(query.shape)
    keys, _ = cached.caches
    spans = cached.spans(spans_at_a_time(keys.shape[1], keys.device))
    return [
        partial(
            decode_attention,
            query, cached.caches, table, spans, cached.page, scale, None, out,
        )
        for table in cached.tables
    ]  # fmt: skip
