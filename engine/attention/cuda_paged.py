"""What the backends for CUDA share: the layout of their cache, and a step's rows by kind."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.attention.backend import AttentionBackend, AttentionBatch


@dataclass(slots=True)
class PagedRows:
    """Decode rows and the others of one step, once for all layers; tensors are on the device."""

    num_decodes: int
    block_size: int
    decode_table: torch.Tensor
    """Block tables of the decode rows, int32 [decodes, blocks]."""
    decode_lens: torch.Tensor
    """Their keys, int32 [decodes]."""
    spans: torch.Tensor
    """See `AttentionBatch.spans`."""
    table: torch.Tensor
    """Of all rows, int32 [rows, blocks]."""
    tiles: torch.Tensor
    """See `AttentionBatch.tiles`."""
    num_tiles: torch.Tensor
    """See `AttentionBatch.num_tiles`."""
    padded: bool
    """See `AttentionBatch.padded`."""
    query_starts: torch.Tensor
    """See `AttentionBatch.query_starts`."""
    key_starts: torch.Tensor
    """See `AttentionBatch.key_starts`."""
    max_query_len: int
    """Most tokens that one of these rows computes; 0 when there is none."""
    max_seq_len: int
    """Most keys of one of these rows; 0 when there is none."""


class CudaPagedAttention(AttentionBackend):
    """Keys and values of a layer in two halves of one tensor."""

    def kv_cache_shape(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int
    ) -> tuple[int, ...]:
        """[keys and values, blocks, block size, kv heads, head dim]."""
        return (2, num_blocks, block_size, num_kv_heads, head_dim)

    def slots(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AttentionBackend.slots`."""
        return kv_cache[0].flatten(0, 1), kv_cache[1].flatten(0, 1)

    def prepare(self, batch: AttentionBatch) -> PagedRows:
        """Divide the rows by kind."""
        count = batch.num_decodes
        return PagedRows(
            num_decodes=count,
            block_size=batch.block_size,
            decode_table=batch.block_table[:count],
            decode_lens=batch.decode_lens,
            spans=batch.spans,
            table=batch.block_table,
            tiles=batch.tiles,
            num_tiles=batch.num_tiles,
            padded=batch.padded,
            query_starts=batch.query_starts,
            key_starts=batch.key_starts,
            max_query_len=max(batch.query_lens[count:], default=0),
            max_seq_len=max(batch.seq_lens[count:], default=0),
        )
