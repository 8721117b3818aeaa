"""Paged attention by flash-attn 2, for CUDA.

Decode rows go to `flash_attn_with_kvcache`, which splits long sequences over the GPU; the others to
`flash_attn_varlen_func`, which reads cached prefixes through the same block table.
"""

from __future__ import annotations

import torch
from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

from engine.attention.cuda_paged import CudaPagedAttention, PagedRows


class FlashAttention(CudaPagedAttention):
    """flash-attn 2 over pages of 256 tokens, the smallest that its paged kernels take."""

    block_size = 256

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: PagedRows,
        scale: float,
        sliding_window: int | None = None,
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`."""
        window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
        decodes = metadata.num_decodes
        if not metadata.max_query_len:
            return _decode(query, kv_cache, metadata, scale, window)
        prefilled: torch.Tensor = flash_attn_varlen_func(
            query[decodes:],
            kv_cache[0],
            kv_cache[1],
            cu_seqlens_q=metadata.query_starts,
            cu_seqlens_k=metadata.key_starts,
            max_seqlen_q=metadata.max_query_len,
            max_seqlen_k=metadata.max_seq_len,
            softmax_scale=scale,
            causal=True,
            window_size=window,
            block_table=metadata.table[decodes:],
        )
        if not decodes:
            return prefilled
        return torch.cat([_decode(query[:decodes], kv_cache, metadata, scale, window), prefilled])


def _decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    metadata: PagedRows,
    scale: float,
    window: tuple[int, int],
) -> torch.Tensor:
    attended: torch.Tensor = flash_attn_with_kvcache(
        query.unsqueeze(1),
        kv_cache[0],
        kv_cache[1],
        cache_seqlens=metadata.decode_lens,
        block_table=metadata.decode_table,
        softmax_scale=scale,
        causal=True,
        window_size=window,
    )
    return attended.squeeze(1)
