"""What an attention backend must offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(slots=True)
class AttentionBatch:
    """Layout of the tokens of one step; rows that compute one token come first."""

    num_decodes: int
    """Leading rows that compute exactly one token."""
    query_lens: list[int]
    """Tokens computed by each row."""
    seq_lens: list[int]
    """Keys that each row's last token sees: those in the cache and those of this step."""
    block_table: torch.Tensor
    """Block ids of each row, int32 [rows, blocks], padded with 0."""
    slot_mapping: torch.Tensor
    """Cache slot (block × block size + offset) of each token, int64 [tokens]."""
    block_size: int
    """Tokens in a block."""


class AttentionBackend(ABC):
    """Writes keys and values to the paged cache and attends over it."""

    block_size: int
    """Tokens in a block that suit the backend best."""

    @abstractmethod
    def kv_cache_shape(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int
    ) -> tuple[int, ...]:
        """Shape of one layer's cache."""

    @abstractmethod
    def prepare(self, batch: AttentionBatch) -> Any:
        """Turn a batch into the metadata that every layer's `forward` of the step shares."""

    @abstractmethod
    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: Any,
        scale: float,
        sliding_window: int | None = None,
    ) -> torch.Tensor:
        """Causal attention of a step's tokens over their sequences.

        Args:
            query: [tokens, heads, head_dim].
            key: [tokens, kv_heads, head_dim], rotated; written to the cache first.
            value: [tokens, kv_heads, head_dim].
            kv_cache: one layer's cache, of `kv_cache_shape`.
            metadata: what `prepare` returned.
            scale: factor on the dot products.
            sliding_window: keys that a query sees, itself included; None sees all.

        Returns:
            [tokens, heads, head_dim].
        """
