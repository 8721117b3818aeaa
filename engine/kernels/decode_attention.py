"""Paged attention of one new token a sequence, long sequences split over several programs.

Flash-decoding (Dao et al. 2023, "Flash-Decoding for long-context inference"): programs attend over
spans of the keys, and whichever ends last joins the results, in the spans' order. The query heads
that share a key head are rows of one tile, so that keys and values are read once. The host, which
knows all lengths, says what the spans are: see `engine.attention.spans`.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels.launch import num_processors, overlaps_launches, shared_memory

_PROGRAMS_PER_PROCESSOR = 4
_LOG2_E = 1.4426950408889634


@triton.jit
def _attend(
    q, key_cache, value_cache, table, start, end, head_offset, scale, slot_stride,
    BLOCK_SIZE: tl.constexpr, GROUP_BLOCK: tl.constexpr, DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr, KEYS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys from `start` to `end`: highest score, weight and sum.

    `ALIGNED`: the keys of a step of the loop lie in one block.
    """
    dim = tl.arange(0, DIM_BLOCK)
    highest = tl.full((GROUP_BLOCK,), -1e30, tl.float32)
    weight = tl.zeros((GROUP_BLOCK,), tl.float32)
    attended = tl.zeros((GROUP_BLOCK, DIM_BLOCK), tl.float32)
    for at in range(start, end, KEYS):
        key = at + tl.arange(0, KEYS)
        seen = key < end
        if ALIGNED:
            block = tl.load(table + at // BLOCK_SIZE).to(tl.int64)
            place = (block * BLOCK_SIZE + at % BLOCK_SIZE) * slot_stride + head_offset
            place += tl.arange(0, KEYS)[:, None] * slot_stride + dim[None, :]
        else:
            block = tl.load(table + key // BLOCK_SIZE, mask=seen, other=0)
            slot = (block.to(tl.int64) * BLOCK_SIZE + key % BLOCK_SIZE) * slot_stride
            place = slot[:, None] + head_offset + dim[None, :]
        readable = seen[:, None] & (dim[None, :] < DIM)
        k = tl.load(key_cache + place, mask=readable, other=0.0)
        v = tl.load(value_cache + place, mask=readable, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        score = tl.where(seen[None, :], score, -1e30)
        risen = tl.maximum(highest, tl.max(score, axis=1))
        decay = tl.exp2(highest - risen)
        probability = tl.exp2(score - risen[:, None])
        weight = weight * decay + tl.sum(probability, axis=1)
        attended = attended * decay[:, None]
        attended = tl.dot(probability.to(v.dtype), v, attended, input_precision="ieee")
        highest = risen
    return highest, weight, attended


@triton.jit
def _join(
    partials, stats, first, num_kv, num_spans, GROUP_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr
):
    """Weight and sum over the spans of a row and head, `num_kv` apart from `first` on, in order."""
    group = tl.arange(0, GROUP_BLOCK)
    tile = group[:, None] * DIM_BLOCK + tl.arange(0, DIM_BLOCK)[None, :]
    highest = tl.full((GROUP_BLOCK,), -1e30, tl.float32)
    weight = tl.zeros((GROUP_BLOCK,), tl.float32)
    attended = tl.zeros((GROUP_BLOCK, DIM_BLOCK), tl.float32)
    for span in range(num_spans):
        theirs = (first + span * num_kv) * GROUP_BLOCK
        their_highest = tl.load(stats + theirs * 2 + group, cache_modifier=".cg")
        their_weight = tl.load(stats + theirs * 2 + GROUP_BLOCK + group, cache_modifier=".cg")
        their_sum = tl.load(partials + theirs * DIM_BLOCK + tile, cache_modifier=".cg")
        risen = tl.maximum(highest, their_highest)
        decay, growth = tl.exp2(highest - risen), tl.exp2(their_highest - risen)
        weight = weight * decay + their_weight * growth
        attended = attended * decay[:, None] + their_sum * growth[:, None]
        highest = risen
    return weight, attended


@triton.jit(do_not_specialize=["block_table", "spans", "window", "table_stride", "num_kv"])
def _decode_kernel(
    query, key_cache, value_cache, block_table, spans, out, partials, stats, arrivals,
    scale, window, query_stride, slot_stride, head_stride, table_stride, num_kv,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr,
    DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, KEYS: tl.constexpr,
    WINDOW: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    # What is read before the wait is the step's layout; see `overlaps_launches`.
    if OVERLAP:
        gdc_launch_dependents()
    item = tl.program_id(0)
    entry, kv_head = spans + item // num_kv * 4, item % num_kv
    sequence, span = tl.load(entry), tl.load(entry + 1)
    num_spans, length = tl.load(entry + 2), tl.load(entry + 3)
    first = tl.maximum(length - window, 0) if WINDOW else 0
    size = tl.maximum(tl.cdiv(tl.cdiv(length - first, num_spans), KEYS), 1) * KEYS
    num_spans = tl.cdiv(length - first, size)  # whole tiles may leave fewer; none of padding
    if OVERLAP:
        gdc_wait()
    if span >= num_spans:
        return
    group, dim = tl.arange(0, GROUP_BLOCK), tl.arange(0, DIM_BLOCK)
    heads = kv_head * GROUP + group
    of_group = (group[:, None] < GROUP) & (dim[None, :] < DIM)
    row = sequence.to(tl.int64)
    place = query + row * query_stride + heads[:, None] * DIM + dim[None, :]
    q = tl.load(place, mask=of_group, other=0.0)
    start = first + span * size
    highest, weight, attended = _attend(
        q, key_cache, value_cache, block_table + row * table_stride,
        start, tl.minimum(start + size, length), kv_head * head_stride, scale, slot_stride,
        BLOCK_SIZE, GROUP_BLOCK, DIM, DIM_BLOCK, KEYS, not WINDOW and BLOCK_SIZE % KEYS == 0,
    )  # fmt: skip
    place = out + (row * num_kv * GROUP + heads[:, None]) * DIM + dim[None, :]
    if num_spans == 1:
        # Not by way of the store below: to meet the joined sums, these would change their layout.
        tl.store(place, attended / weight[:, None], mask=of_group)
        return
    mine = item * GROUP_BLOCK
    tl.store(partials + (mine + group[:, None]) * DIM_BLOCK + dim[None, :], attended)
    tl.store(stats + mine * 2 + group, highest)
    tl.store(stats + mine * 2 + GROUP_BLOCK + group, weight)
    tl.debug_barrier()
    pair = item - span * num_kv  # where the first span of this row and head is
    if tl.atomic_add(arrivals + pair, 1, sem="acq_rel") < num_spans - 1:
        return
    tl.store(arrivals + pair, 0)
    weight, attended = _join(partials, stats, pair, num_kv, num_spans, GROUP_BLOCK, DIM_BLOCK)
    tl.store(place, attended / weight[:, None], mask=of_group)


def decode_attention(
    query: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    block_table: torch.Tensor,
    spans: torch.Tensor,
    block_size: int,
    scale: float,
    window: int | None,
    out: torch.Tensor,
) -> None:
    """Attend with one query a sequence over its cached keys.

    Calls may not overlap on one device: they share scratch memory.

    Args:
        query: [sequences, heads, head_dim], the heads of a token side by side.
        caches: keys and values, each [slots, kv heads, head_dim].
        block_table: int32 [sequences, blocks].
        spans: int32 [spans, 4], see `AttentionBatch.spans`. Long sequences come first: then the GPU
            is busy to the end (Graham 1969, "Bounds on Multiprocessing Timing Anomalies").
        block_size: slots in a block.
        scale: factor on the dot products.
        window: keys that a query sees, itself included; None sees all.
        out: contiguous, of the queries' shape; rows without a span stay as they are.
    """
    keys, values = caches
    (_, heads, dim), num_kv = query.shape, keys.shape[1]
    overlap = overlaps_launches(query.device)
    group_block = max(16, triton.next_power_of_2(heads // num_kv))
    dim_block = max(16, triton.next_power_of_2(dim))
    grid = len(spans) * num_kv
    partials, stats = _scratch(
        min(grid, _most_joined(query.device)), group_block, dim_block, query.device
    )
    tile, stages = _tile(query.element_size() * dim_block, query.device)
    _decode_kernel[(grid,)](
        query, keys, values, block_table, spans, out, partials, stats, _arrivals(query.device),
        scale * _LOG2_E, window or 0, query.stride(0), keys.stride(0), keys.stride(1),
        block_table.stride(0), num_kv, BLOCK_SIZE=block_size, GROUP=heads // num_kv,
        GROUP_BLOCK=group_block, DIM=dim, DIM_BLOCK=dim_block, KEYS=tile,
        WINDOW=window is not None, OVERLAP=overlap, launch_pdl=overlap, num_warps=4,
        num_stages=stages,
    )  # fmt: skip


def spans_at_a_time(num_kv_heads: int, device: torch.device) -> int:
    """See `AttentionBackend.spans_at_a_time`: each takes a program for every kv head."""
    return max(1, _PROGRAMS_PER_PROCESSOR * num_processors(device) // num_kv_heads)


def _most_joined(device: torch.device) -> int:
    """Programs of split sequences at most, see `engine.attention.spans`."""
    return 2 * _PROGRAMS_PER_PROCESSOR * num_processors(device)


@cache
def _tile(row_bytes: int, device: torch.device) -> tuple[int, int]:
    """Keys in a step of the loop, and Triton's stages: 16 KiB of keys a step, and as many values.

    So several programs share a multiprocessor: while one begins, computes or ends, others read.
    As a page is looked up before its keys are read, three stages hold little more than one step.
    """
    return max(16, 2**14 // row_bytes), min(3, shared_memory(device) // 2**15)


@cache
def _arrivals(device: torch.device) -> torch.Tensor:
    """How many spans of a sequence and head have ended; each call leaves zeros behind."""
    return torch.zeros(_most_joined(device), dtype=torch.int32, device=device)


def _scratch(
    programs: int, group_block: int, dim_block: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the programs' spans, and their statistics."""
    partials = torch.empty(programs * group_block * dim_block, dtype=torch.float32, device=device)
    return partials, torch.empty(programs * group_block * 2, dtype=torch.float32, device=device)
