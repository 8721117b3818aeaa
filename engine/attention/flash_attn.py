"""Paged attention by flash-attn 2, for CUDA.

Decode rows go to `flash_attn_with_kvcache`, which splits long sequences over the GPU; the others to
`flash_attn_varlen_func`, which reads cached prefixes through the same block table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

from engine.attention.backend import AttentionBackend, AttentionBatch


@dataclass(slots=True)
class FlashMetadata:
    """Lengths and tables of one step, on the device."""

    num_decodes: int
    slot_mapping: torch.Tensor
    seq_lens: torch.Tensor
    """int32 [rows]."""
    block_table: torch.Tensor
    """int32 [rows, blocks]."""
    cu_query_lens: torch.Tensor | None
    """Of the rows after the decodes, int32 [rows - decodes + 1]; None when there are none."""
    cu_seq_lens: torch.Tensor | None
    max_query_len: int
    max_seq_len: int


class FlashAttention(AttentionBackend):
    """flash-attn 2 over pages of 256 tokens, the smallest that its paged kernels take."""

    block_size = 256

    def kv_cache_shape(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int
    ) -> tuple[int, ...]:
        """[keys and values, blocks, block size, kv heads, head dim]."""
        return (2, num_blocks, block_size, num_kv_heads, head_dim)

    def prepare(self, batch: AttentionBatch) -> FlashMetadata:
        """Bring lengths to the device."""
        device, decodes = batch.block_table.device, batch.num_decodes
        seq_lens = torch.tensor(batch.seq_lens, dtype=torch.int32)
        query_lens = torch.tensor(batch.query_lens[decodes:], dtype=torch.int32)
        mixed = len(query_lens) > 0
        return FlashMetadata(
            num_decodes=decodes,
            slot_mapping=batch.slot_mapping,
            seq_lens=seq_lens.to(device, non_blocking=True),
            block_table=batch.block_table,
            cu_query_lens=_cumulated(query_lens, device) if mixed else None,
            cu_seq_lens=_cumulated(seq_lens[decodes:], device) if mixed else None,
            max_query_len=int(query_lens.max()) if mixed else 1,
            max_seq_len=int(seq_lens[decodes:].max()) if mixed else 0,
        )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: FlashMetadata,
        scale: float,
        sliding_window: int | None = None,
    ) -> torch.Tensor:
        """See `AttentionBackend.forward`."""
        kv_cache[0].flatten(0, 1).index_copy_(0, metadata.slot_mapping, key)
        kv_cache[1].flatten(0, 1).index_copy_(0, metadata.slot_mapping, value)
        window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
        decodes = metadata.num_decodes
        if metadata.cu_query_lens is None:
            return _decode(query, kv_cache, metadata, scale, window)
        prefilled: torch.Tensor = flash_attn_varlen_func(
            query[decodes:],
            kv_cache[0],
            kv_cache[1],
            cu_seqlens_q=metadata.cu_query_lens,
            cu_seqlens_k=metadata.cu_seq_lens,
            max_seqlen_q=metadata.max_query_len,
            max_seqlen_k=metadata.max_seq_len,
            softmax_scale=scale,
            causal=True,
            window_size=window,
            block_table=metadata.block_table[decodes:],
        )
        if not decodes:
            return prefilled
        return torch.cat([_decode(query[:decodes], kv_cache, metadata, scale, window), prefilled])


def _decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    metadata: FlashMetadata,
    scale: float,
    window: tuple[int, int],
) -> torch.Tensor:
    count = len(query)
    attended: torch.Tensor = flash_attn_with_kvcache(
        query.unsqueeze(1),
        kv_cache[0],
        kv_cache[1],
        cache_seqlens=metadata.seq_lens[:count],
        block_table=metadata.block_table[:count],
        softmax_scale=scale,
        causal=True,
        window_size=window,
    )
    return attended.squeeze(1)


def _cumulated(lengths: torch.Tensor, device: torch.device) -> torch.Tensor:
    total = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=total[1:])
    return total.to(device, non_blocking=True)
