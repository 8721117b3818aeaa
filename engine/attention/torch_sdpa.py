"""Paged attention on plain torch: for CPUs, and the last resort on GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.nn.functional import scaled_dot_product_attention

from engine.attention.backend import AttentionBackend, AttentionBatch

_GROUP_SPAN = 0.75
"""Decode rows go apart from one of which they have less than this share of the length …"""
_GROUP_GAIN = 256
"""… when that spares more tokens of padding than this: a further group takes as long as they do."""
_GROUP_TOKENS = 8192
"""Most tokens, padding included, of a group, so that what it gathers stays in the CPU's caches."""


@dataclass(slots=True)
class DecodeGroup:
    """Decode rows of like length, attended in one operation."""

    rows: torch.Tensor | None
    """Which of the step's tokens they are, int64 [rows]; None when they are its first `size`."""
    size: int
    blocks: torch.Tensor
    """Their block tables one after the other, int32 [rows × blocks each]."""
    seq_lens: torch.Tensor
    """int64 [rows, 1]."""
    gathered: torch.Tensor | None = None
    """Their pages of one layer; reused by the next, as fresh memory of that size is slow to get."""


@dataclass(slots=True)
class PrefillRow:
    """A row that computes several tokens."""

    first: int
    """Index of its first token among the step's."""
    query_len: int
    seq_len: int
    blocks: torch.Tensor
    """int32 [blocks]."""


@dataclass(slots=True)
class TorchMetadata:
    """What the layers of one step share."""

    decodes: list[DecodeGroup]
    prefills: list[PrefillRow]
    masks: dict[tuple[int, int | None], torch.Tensor] = field(default_factory=dict)
    """Additive masks by (index among decodes and then prefills, sliding window)."""


class TorchAttention(AttentionBackend):
    """Gathers the pages of a decode batch and attends over them in one masked operation.

    The query heads that share a key head are laid out as query rows of that head, so that grouped
    heads cost no copy.
    """

    block_size = 16
    capturable = False  # it groups rows by their lengths, on the host

    def kv_cache_shape(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int
    ) -> tuple[int, ...]:
        """[blocks, block size, key and value, kv heads, head dim]: a page is one stretch."""
        return (num_blocks, block_size, 2, num_kv_heads, head_dim)

    def slots(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AttentionBackend.slots`."""
        slots = kv_cache.flatten(0, 1)
        return slots[:, 0], slots[:, 1]

    def prepare(self, batch: AttentionBatch) -> TorchMetadata:
        """Group the decode rows by length and list the others."""
        first, prefills = batch.num_decodes, []
        for row in range(batch.num_decodes, len(batch.query_lens)):
            count, seq_len = batch.query_lens[row], batch.seq_lens[row]
            blocks = batch.block_table[row, : -(-seq_len // batch.block_size)]
            prefills.append(PrefillRow(first, count, seq_len, blocks))
            first += count
        return TorchMetadata(list(_decode_groups(batch)), prefills)

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: TorchMetadata,
        scale: float,
        sliding_window: int | None = None,
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`."""
        if len(metadata.decodes) == 1 and metadata.decodes[0].size == len(query):
            return self._decode(query, kv_cache, metadata, 0, scale, sliding_window)
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        for index, group in enumerate(metadata.decodes):
            rows = slice(0, group.size) if group.rows is None else group.rows
            output[rows] = self._decode(
                query[rows], kv_cache, metadata, index, scale, sliding_window
            )
        for index, row in enumerate(metadata.prefills, len(metadata.decodes)):
            tokens = slice(row.first, row.first + row.query_len)
            pages = kv_cache[row.blocks].flatten(0, 1)[: row.seq_len]
            mask = _prefill_mask(metadata, index, row, query, sliding_window)
            output[tokens] = _attend_row(query[tokens], pages[:, 0], pages[:, 1], mask, scale)
        return output

    def _decode(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: TorchMetadata,
        index: int,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """[rows, heads, head_dim] → the same."""
        group = metadata.decodes[index]
        if group.gathered is None:
            group.gathered = kv_cache.new_empty((len(group.blocks), *kv_cache.shape[1:]))
        torch.index_select(kv_cache, 0, group.blocks, out=group.gathered)
        pages = group.gathered.view(group.size, -1, *kv_cache.shape[2:])
        keys, values = pages[:, :, 0].transpose(1, 2), pages[:, :, 1].transpose(1, 2)
        grouped = query.reshape(group.size, keys.shape[1], -1, query.shape[-1])
        mask = _decode_mask(metadata, index, query, pages.shape[1], sliding_window)
        attended = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
        return attended.reshape(query.shape)


def _decode_groups(batch: AttentionBatch) -> Iterator[DecodeGroup]:
    """Decode rows by falling length, a new group whenever that saves enough padding."""
    lens = batch.seq_lens[: batch.num_decodes]
    order = sorted(range(len(lens)), key=lens.__getitem__, reverse=True)
    first = 0
    for last in range(1, len(order) + 1):
        longest = lens[order[first]]
        if last < len(order):
            shorter, rest = lens[order[last]], len(order) - last
            apart = shorter < _GROUP_SPAN * longest and rest * (longest - shorter) > _GROUP_GAIN
            if not apart and (last - first + 1) * longest <= _GROUP_TOKENS:
                continue
        yield _decode_group(batch, order[first:last])
        first = last


def _decode_group(batch: AttentionBatch, rows: list[int]) -> DecodeGroup:
    device = batch.block_table.device
    width = -(-batch.seq_lens[rows[0]] // batch.block_size)
    everyone = len(rows) == batch.num_decodes
    if everyone:
        rows = sorted(rows)
    lens = torch.tensor([[batch.seq_lens[row]] for row in rows], device=device)
    index = torch.tensor(rows, device=device)
    blocks = batch.block_table[index, :width].flatten()
    return DecodeGroup(None if everyone else index, len(rows), blocks, lens)


def _decode_mask(
    metadata: TorchMetadata, index: int, query: torch.Tensor, width: int, window: int | None
) -> torch.Tensor:
    """0 where a decode row may look and -inf elsewhere, [rows, 1, 1, width]."""
    mask = metadata.masks.get((index, window))
    if mask is None:
        lens = metadata.decodes[index].seq_lens
        keys = torch.arange(width, device=query.device)
        hidden = keys >= lens
        if window is not None:
            hidden |= keys < lens - window
        mask = _additive(hidden, query.dtype)[:, None, None]
        metadata.masks[index, window] = mask
    return mask


def _prefill_mask(
    metadata: TorchMetadata, index: int, row: PrefillRow, query: torch.Tensor, window: int | None
) -> torch.Tensor | None:
    """The same for the tokens of one row, [tokens, keys]; None where plain causality will do."""
    if row.seq_len == row.query_len and (window is None or row.seq_len <= window):
        return None
    mask = metadata.masks.get((index, window))
    if mask is None:
        keys = torch.arange(row.seq_len, device=query.device)
        positions = keys[row.seq_len - row.query_len :, None]
        hidden = keys > positions
        if window is not None:
            hidden |= keys <= positions - window
        mask = metadata.masks[index, window] = _additive(hidden, query.dtype)
    return mask


def _additive(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(
        hidden, -torch.inf
    )


def _attend_row(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """One row's tokens [tokens, heads, head_dim] over its keys [keys, kv heads, head_dim]."""
    shared = query.shape[1] // keys.shape[1]
    attended = scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0),
        keys.repeat_interleave(shared, 1).transpose(0, 1).unsqueeze(0),
        values.repeat_interleave(shared, 1).transpose(0, 1).unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
    )
    return attended.squeeze(0).transpose(0, 1)
