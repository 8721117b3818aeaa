"""What an attention backend must offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

QUERY_TILE = 64
"""Most queries of an entry of `AttentionBatch.tiles`."""


@dataclass(slots=True)
class AttentionBatch:
    """Layout of the tokens of one step; rows that compute one token come first."""

    num_decodes: int
    """Leading rows that compute exactly one token; if `padded`, all rows."""
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
    decode_lens: torch.Tensor
    """`seq_lens` of the decode rows where the model runs, int32 [decodes]; if `padded`, 0 for rows
    that compute no token or several."""
    query_starts: torch.Tensor
    """First token of each row after the decodes, counted from the first of them, and the end of the
    last; int32 [rows - decodes + 1]."""
    key_starts: torch.Tensor
    """The same sum over the keys of these rows; int32 [rows - decodes + 1]."""
    spans: torch.Tensor
    """Parts of the decode rows' keys for programs of their own, int32 [spans, 4]: the row, which of
    its spans, how many it has, and its keys. Rows that see the most keys come first, those without
    any have none; in a graph, spans of no keys follow. Spans of rows that have several are at most
    twice `AttentionBackend.spans_at_a_time`: kernels have no room for more."""
    tiles: torch.Tensor
    """Up to `QUERY_TILE` tokens of a row that computes several, int32 [tiles, 4]: the row, the
    first of the tokens, how many, and the first one's position. Those that see the most keys come
    first; if `padded`, others follow that do not count."""
    num_tiles: torch.Tensor
    """How many of these count, int32 [1]."""
    padded: bool = False
    """Shapes are those of a graph; `query_starts` and `key_starts` are not to be used."""


class AttentionBackend(ABC):
    """Lays out the paged cache and attends over it.

    Keys and values of a step are written to the cache, through `slots`, before it is attended.
    Metadata of a decode batch may be captured in a CUDA graph: it refers to the batch's tensors,
    which a replay fills anew.
    """

    block_size: int
    """Tokens in a block that suit the backend best."""
    capturable: ClassVar[bool] = True
    """Decode batches may be captured in a CUDA graph."""
    captures_prefill: ClassVar[bool] = False
    """And so may `padded` ones."""

    def spans_at_a_time(self, num_kv_heads: int, device: torch.device) -> int:
        """How many of `AttentionBatch.spans` fill the device; 0 if they are not used."""
        return 0

    @abstractmethod
    def kv_cache_shape(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int
    ) -> tuple[int, ...]:
        """Shape of one layer's cache."""

    @abstractmethod
    def slots(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of one layer's keys and values, each [slots, kv heads, head_dim]."""

    @abstractmethod
    def prepare(self, batch: AttentionBatch) -> Any:
        """Turn a batch into the metadata that every layer's `attend` of the step shares."""

    @abstractmethod
    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: Any,
        scale: float,
        sliding_window: int | None = None,
    ) -> torch.Tensor:
        """Causal attention of a step's tokens over their sequences.

        Args:
            query: [tokens, heads, head_dim], rotated.
            kv_cache: one layer's cache, of `kv_cache_shape`, the step's keys and values included.
            metadata: what `prepare` returned.
            scale: factor on the dot products.
            sliding_window: keys that a query sees, itself included; None sees all.

        Returns:
            [tokens, heads, head_dim].
        """
