"""Paged attention by flash-attn 2, for CUDA.

Decode rows go to `flash_attn_with_kvcache`, which splits long sequences over the GPU; the others to
`flash_attn_varlen_func`, which reads cached prefixes through the same block table.
"""

from __future__ import annotations

import torch
from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

from engine.attention.backend import AttentionBackend, AttentionBatch


class FlashAttention(AttentionBackend):
    """flash-attn 2 over pages of 256 tokens, the smallest that its paged kernels take."""

    block_size = 256

    def kv_cache_shape(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int
    ) -> tuple[int, ...]:
        """[keys and values, blocks, block size, kv heads, head dim]."""
        return (2, num_blocks, block_size, num_kv_heads, head_dim)

    def slots(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AttentionBackend.slots`."""
        return kv_cache[0].flatten(0, 1), kv_cache[1].flatten(0, 1)

    def prepare(self, batch: AttentionBatch) -> AttentionBatch:
        """The batch itself: the kernels read lengths and tables from its tensors."""
        return batch

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionBatch,
        scale: float,
        sliding_window: int | None = None,
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`."""
        window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
        decodes = metadata.num_decodes
        if decodes == len(metadata.query_lens):
            return _decode(query, kv_cache, metadata, scale, window)
        prefilled: torch.Tensor = flash_attn_varlen_func(
            query[decodes:],
            kv_cache[0],
            kv_cache[1],
            cu_seqlens_q=metadata.query_starts,
            cu_seqlens_k=metadata.key_starts,
            max_seqlen_q=max(metadata.query_lens[decodes:]),
            max_seqlen_k=max(metadata.seq_lens[decodes:]),
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
    metadata: AttentionBatch,
    scale: float,
    window: tuple[int, int],
) -> torch.Tensor:
    count = len(query)
    attended: torch.Tensor = flash_attn_with_kvcache(
        query.unsqueeze(1),
        kv_cache[0],
        kv_cache[1],
        cache_seqlens=metadata.device_seq_lens[:count],
        block_table=metadata.block_table[:count],
        softmax_scale=scale,
        causal=True,
        window_size=window,
    )
    return attended.squeeze(1)
