"""Head normalisation, rotary embedding and the write to the paged cache, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels.launch import overlaps_launches

_HEADS = 16
"""Heads of a token that a program handles."""


@triton.jit
def _rotate_and_store_kernel(
    qkv, positions, slots, table, q_norm, k_norm, key_cache, value_cache,
    eps, slot_stride, head_stride,
    NUM_Q: tl.constexpr, NUM_KV: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
    HEADS: tl.constexpr, NORM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    offset = tl.arange(0, HALF_BLOCK)[None, :]
    total: tl.constexpr = NUM_Q + 2 * NUM_KV
    inside = (head < total) & (offset < HALF)
    here = qkv + (token * total + head) * 2 * HALF + offset
    is_value = head >= NUM_Q + NUM_KV
    # What is read before the wait is the step's layout; see `overlaps_launches`.
    if OVERLAP:
        gdc_launch_dependents()
    angle = table + tl.load(positions + token) * 2 * HALF + offset
    cos = tl.load(angle, mask=inside & ~is_value, other=1.0)
    sin = tl.load(angle + HALF, mask=inside & ~is_value, other=0.0)
    slot = tl.load(slots + token).to(tl.int64) * slot_stride + offset
    if OVERLAP:
        gdc_wait()
    left = tl.load(here, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(here + HALF, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        square = tl.sum(left * left + right * right, axis=1)[:, None]
        scale = tl.where(is_value, 1.0, tl.rsqrt(square / (2 * HALF) + eps))
        left *= scale * _norm_weight(q_norm, k_norm, head, offset, NUM_Q, is_value, inside)
        right *= scale * _norm_weight(q_norm, k_norm, head, offset + HALF, NUM_Q, is_value, inside)
    turned_left = (left * cos - right * sin).to(qkv.dtype.element_ty)
    turned_right = (right * cos + left * sin).to(qkv.dtype.element_ty)
    is_query = inside & (head < NUM_Q)
    tl.store(here, turned_left, mask=is_query)
    tl.store(here + HALF, turned_right, mask=is_query)
    key = key_cache + slot + (head - NUM_Q) * head_stride
    is_key = inside & (head >= NUM_Q) & ~is_value
    tl.store(key, turned_left, mask=is_key)
    tl.store(key + HALF, turned_right, mask=is_key)
    value = value_cache + slot + (head - NUM_Q - NUM_KV) * head_stride
    tl.store(value, turned_left, mask=inside & is_value)
    tl.store(value + HALF, turned_right, mask=inside & is_value)


@triton.jit
def _norm_weight(q_norm, k_norm, head, offset, NUM_Q: tl.constexpr, is_value, inside):
    query = tl.load(q_norm + offset + 0 * head, mask=inside & (head < NUM_Q), other=0.0)
    key = tl.load(k_norm + offset + 0 * head, mask=inside & (head >= NUM_Q), other=0.0)
    weight = tl.where(head < NUM_Q, query, key).to(tl.float32)
    return tl.where(is_value, 1.0, weight)


def rotate_and_store(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    table: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    num_heads: int,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
) -> torch.Tensor:
    """Normalise and rotate queries and keys, and write keys and values to the cache.

    Args:
        qkv: contiguous [tokens, heads of queries, keys and values × head_dim]; its queries are
            overwritten.
        positions: integers [tokens].
        slots: cache slot of each token, integers [tokens].
        table: cosines and then sines by position, float32 [positions, head_dim].
        caches: keys and values, each [slots, kv heads, head_dim] with dense heads.
        num_heads: of the queries.
        norms: weights of the head normalisation of queries and keys, [head_dim] each, or None.
        eps: of that normalisation.

    Returns:
        Queries, a view of `qkv` of shape [tokens, heads, head_dim].
    """
    keys, values = caches
    num_kv, head_dim = keys.shape[1:]
    tokens, half = len(qkv), head_dim // 2
    q_norm, k_norm = norms if norms is not None else (qkv, qkv)
    overlap = overlaps_launches(qkv.device)
    grid = (tokens, triton.cdiv(num_heads + 2 * num_kv, _HEADS))
    _rotate_and_store_kernel[grid](
        qkv, positions, slots, table, q_norm, k_norm, keys, values,
        eps, keys.stride(0), keys.stride(1),
        NUM_Q=num_heads, NUM_KV=num_kv, HALF=half, HALF_BLOCK=triton.next_power_of_2(half),
        HEADS=_HEADS, NORM=norms is not None, OVERLAP=overlap, num_warps=8, launch_pdl=overlap,
    )  # fmt: skip
    return qkv.view(tokens, -1, head_dim)[:, :num_heads]
