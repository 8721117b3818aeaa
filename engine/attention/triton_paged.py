"""Paged attention by this project's own Triton kernels, for CUDA."""

from __future__ import annotations

import torch

from engine.attention.backend import QUERY_TILE
from engine.attention.cuda_paged import CudaPagedAttention, PagedRows
from engine.kernels.decode_attention import decode_attention, spans_at_a_time
from engine.kernels.prefill_attention import prefill_attention


class TritonAttention(CudaPagedAttention):
    """Decode rows and prefill rows by one kernel each, over pages of any size."""

    block_size = 64  # a tile of the prefill kernel, which then looks up one page for each
    captures_prefill = True

    def spans_at_a_time(self, num_kv_heads: int, device: torch.device) -> int:
        """See `AttentionBackend.spans_at_a_time`."""
        return spans_at_a_time(num_kv_heads, device)

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
                metadata.spans,
                metadata.block_size,
                scale,
                sliding_window,
                out[:count],
            )
        if len(metadata.tiles):
            prefill_attention(
                query,
                caches,
                metadata.table,
                metadata.tiles,
                QUERY_TILE,
                metadata.block_size,
                scale,
                sliding_window,
                out,
                metadata.num_tiles if metadata.padded else None,
            )
        return out
