"""Paged causal attention of many new tokens a sequence, over cached and new keys.

FlashAttention-2 (Dao 2023, arXiv:2307.08691): a program keeps a tile of queries and goes over the
keys that they see; keys and values of this step are in the cache already.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels.launch import num_processors, overlaps_launches

_PROGRAMS_PER_PROCESSOR = 2
"""That go over the tiles in turns, where the host cannot tell how many there are: as many as have
room on a Hopper's multiprocessor at heads of 128."""
_LOG2_E = 1.4426950408889634


@triton.jit
def _attend_keys(
    q, state, key_cache, value_cache, table, position, begin, end, scale, window, head_offset,
    slot_stride, BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    KEYS: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Take in the keys from `begin` to `end`; not `MASKED`: every query sees all of them."""
    highest, weight, attended = state
    dim = tl.arange(0, DIM_BLOCK)
    for at in range(begin, end, KEYS):
        key = at + tl.arange(0, KEYS)
        if BLOCK_SIZE % KEYS == 0:  # the keys lie in one block
            block = tl.load(table + at // BLOCK_SIZE).to(tl.int64)
            place = (block * BLOCK_SIZE + at % BLOCK_SIZE) * slot_stride + head_offset
            place += tl.arange(0, KEYS)[:, None] * slot_stride + dim[None, :]
        else:
            block = tl.load(table + key // BLOCK_SIZE, mask=key < end, other=0)
            slot = (block.to(tl.int64) * BLOCK_SIZE + key % BLOCK_SIZE) * slot_stride
            place = slot[:, None] + head_offset + dim[None, :]
        readable = (key[:, None] < end) & (dim[None, :] < DIM)
        k = tl.load(key_cache + place, mask=readable, other=0.0)
        v = tl.load(value_cache + place, mask=readable, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if MASKED:
            seen = (key[None, :] <= position[:, None]) & (key[None, :] < end)
            if WINDOW:
                seen = seen & (key[None, :] > position[:, None] - window)
            score = tl.where(seen, score, -1e30)
        risen = tl.maximum(highest, tl.max(score, axis=1))
        decay = tl.exp2(highest - risen)
        probability = tl.exp2(score - risen[:, None])
        if WINDOW:  # a tile that hides all keys from a query leaves its maximum at the start value
            probability = tl.where(score > -1e29, probability, 0.0)
        weight = weight * decay + tl.sum(probability, axis=1)
        attended = tl.dot(
            probability.to(v.dtype), v, attended * decay[:, None], input_precision="ieee"
        )
        highest = risen
    return highest, weight, attended


@triton.jit
def _attend_tile(
    query, key_cache, value_cache, block_table, entry, head, out,
    scale, window, query_stride, slot_stride, head_stride, table_stride,
    BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """The queries of a tile, for one head."""
    row, first_token = tl.load(entry), tl.load(entry + 1)
    count, lowest = tl.load(entry + 2), tl.load(entry + 3)
    index = tl.arange(0, QUERIES)
    dim = tl.arange(0, DIM_BLOCK)
    mine = (index[:, None] < count) & (dim[None, :] < DIM)
    token = (first_token + index).to(tl.int64)
    place = token[:, None] * query_stride + head * DIM + dim[None, :]
    q = tl.load(query + place, mask=mine, other=0.0)
    position = lowest + index
    end = lowest + count
    table = block_table + row.to(tl.int64) * table_stride
    head_offset = (head // GROUP) * head_stride
    state = (
        tl.full((QUERIES,), -1e30, tl.float32),
        tl.zeros((QUERIES,), tl.float32),
        tl.zeros((QUERIES, DIM_BLOCK), tl.float32),
    )
    begin = 0
    if WINDOW:
        begin = tl.maximum(lowest - window + 1, 0) // KEYS * KEYS
    diagonal = begin if WINDOW else (lowest + 1) // KEYS * KEYS
    if not WINDOW:
        state = _attend_keys(
            q, state, key_cache, value_cache, table, position, begin, diagonal, scale, window,
            head_offset, slot_stride, BLOCK_SIZE, DIM, DIM_BLOCK, KEYS, False, False,
        )  # fmt: skip
    _, weight, attended = _attend_keys(
        q, state, key_cache, value_cache, table, position, diagonal, end, scale, window,
        head_offset, slot_stride, BLOCK_SIZE, DIM, DIM_BLOCK, KEYS, True, WINDOW,
    )  # fmt: skip
    place = out + (token[:, None] * HEADS + head) * DIM + dim[None, :]
    tl.store(place, attended / weight[:, None], mask=mine)


@triton.jit(
    do_not_specialize=["block_table", "tiles", "count", "num_tiles", "window", "table_stride"]
)
def _prefill_kernel(
    query, key_cache, value_cache, block_table, tiles, count, num_tiles, out,
    scale, window, query_stride, slot_stride, head_stride, table_stride,
    BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr,
    COUNTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    if COUNTS:
        count = tl.load(num_tiles)  # of the step's layout; see `overlaps_launches`
    if OVERLAP:
        gdc_wait()
    for item in range(tl.program_id(0), count * HEADS, tl.num_programs(0)):
        _attend_tile(
            query, key_cache, value_cache, block_table, tiles + item // HEADS * 4, item % HEADS,
            out, scale, window, query_stride, slot_stride, head_stride, table_stride,
            BLOCK_SIZE, HEADS, GROUP, DIM, DIM_BLOCK, QUERIES, KEYS, WINDOW,
        )  # fmt: skip


def prefill_attention(
    query: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    block_table: torch.Tensor,
    tiles: torch.Tensor,
    tile_size: int,
    block_size: int,
    scale: float,
    window: int | None,
    out: torch.Tensor,
    num_tiles: torch.Tensor | None = None,
) -> None:
    """Attend with the new tokens of several sequences, each over its cached keys and its new ones.

    Args:
        query: [tokens, heads, head_dim], the heads of a token side by side.
        caches: keys and values, each [slots, kv heads, head_dim].
        block_table: int32 [rows, blocks].
        tiles: which queries go together, int32 [tiles, 4]; see `AttentionBatch.tiles`.
        tile_size: most queries in one of them, a power of two.
        block_size: slots in a block.
        scale: factor on the dot products.
        window: keys that a query sees, itself included; None sees all.
        out: contiguous, of the queries' shape; rows of tokens in no tile stay as they are.
        num_tiles: how many of `tiles` count, int32 [1]; None if the host knows that all do.
    """
    keys, values = caches
    heads, dim = query.shape[1:]
    dim_block = max(16, triton.next_power_of_2(dim))
    keys_tile, stages = _keys_tile(query.element_size() == 4, dim_block)
    overlap = overlaps_launches(query.device)
    grid = len(tiles) * heads
    if num_tiles is not None:
        grid = min(grid, _PROGRAMS_PER_PROCESSOR * num_processors(query.device))
    _prefill_kernel[(grid,)](
        query, keys, values, block_table, tiles, len(tiles), num_tiles, out,
        scale * _LOG2_E, window or 0, query.stride(0), keys.stride(0), keys.stride(1),
        block_table.stride(0), BLOCK_SIZE=block_size, HEADS=heads, GROUP=heads // keys.shape[1],
        DIM=dim, DIM_BLOCK=dim_block, QUERIES=tile_size, KEYS=keys_tile, WINDOW=window is not None,
        COUNTS=num_tiles is not None, OVERLAP=overlap, launch_pdl=overlap, num_warps=4,
        num_stages=stages,
    )  # fmt: skip


def _keys_tile(full_precision: bool, dim_block: int) -> tuple[int, int]:
    """Keys in a step of the loop and steps in flight, as far as shared memory goes."""
    if full_precision:
        return (32, 1) if dim_block <= 128 else (16, 1)
    return (64, 3) if dim_block <= 128 else (32, 3)
