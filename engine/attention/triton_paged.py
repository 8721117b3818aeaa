"""Paged attention by this project's own Triton kernels, for CUDA."""

from __future__ import annotations

import torch

from engine.attention.cuda_paged import CudaPagedAttention, PagedRows
from engine.kernels.decode_attention import decode_attention
from engine.kernels.prefill_attention import prefill_attention


class TritonAttention(CudaPagedAttention):
    """Decode rows and prefill rows by one kernel each, over pages of any size."""

    block_size = 64  # a tile of the prefill kernel, which then looks up one page for each

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: PagedRows,
        scale: float,
        sliding_window: int | None = None,
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`."""
        count, caches = metadata.num_decodes, self.slots(kv_cache)
        out = query.new_empty(query.shape)
        if count:
            decode_attention(
                query[:count],
                caches,
                metadata.decode_table,
                metadata.decode_lens,
                metadata.decode_order,
                metadata.block_size,
                scale,
                sliding_window,
                out[:count],
            )
        if metadata.max_query_len:
            prefill_attention(
                query[count:],
                caches,
                metadata.prefill_table,
                metadata.query_starts,
                metadata.prefill_lens,
                metadata.max_query_len,
                metadata.block_size,
                scale,
                sliding_window,
                out[count:],
            )
        return out
