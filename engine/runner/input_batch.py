"""Row state that lives across steps, and the input tensors of one step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine.attention.backend import AttentionBatch
from engine.step import StepPlan


@dataclass(slots=True)
class StepInputs:
    """Tensors of one step; T tokens, S sampling rows."""

    token_ids: torch.Tensor
    """int64 [T]."""
    positions: torch.Tensor
    """int64 [T]."""
    attention: AttentionBatch
    sample_rows: list[int]
    """Rows that sample, in the plan's order."""
    sample_positions: list[int]
    """Sequence index of the token that each of them samples."""
    sample_indices: torch.Tensor
    """Which of the T tokens the samples follow, int64 [S]."""


class InputBatch:
    """Block tables and last sampled tokens by row.

    The last sampled tokens live on the device, so that a step can be launched before the host
    knows what the step before it sampled.
    """

    def __init__(
        self, max_num_seqs: int, max_blocks_per_seq: int, block_size: int, device: torch.device
    ) -> None:
        self.block_size = block_size
        self.device = device
        self.block_table = np.zeros((max_num_seqs, max_blocks_per_seq), dtype=np.int32)
        self.last_tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)

    def build(self, plan: StepPlan) -> StepInputs:
        """Take in the plan's new blocks and lay out its tokens."""
        for row, (first, blocks) in plan.new_blocks.items():
            self.block_table[row, first : first + len(blocks)] = blocks
        rows = np.array(plan.rows)
        counts = np.array(plan.num_tokens)
        starts = np.array(plan.starts)
        ends = np.cumsum(counts)
        positions = np.arange(ends[-1]) + np.repeat(starts - (ends - counts), counts)
        samples = np.array(plan.samples)
        return StepInputs(
            token_ids=self._token_ids(plan, ends - counts),
            positions=self._to_device(positions),
            attention=self._attention_batch(rows, counts, starts + counts, positions),
            sample_rows=rows[samples].tolist(),
            sample_positions=(starts + counts)[samples].tolist(),
            sample_indices=self._to_device((ends - 1)[samples]),
        )

    def store_sampled(self, rows: list[int], token_ids: torch.Tensor) -> None:
        """Keep what `rows` sampled (int64 [S], on the device) as input of their next step."""
        self.last_tokens[self._to_device(np.array(rows))] = token_ids

    def _token_ids(self, plan: StepPlan, offsets: np.ndarray) -> torch.Tensor:
        known = np.zeros(int(offsets[-1]) + plan.num_tokens[-1], dtype=np.int64)
        sampled_rows, sampled_offsets = [], []
        for row, offset, count in zip(plan.rows, offsets.tolist(), plan.num_tokens, strict=True):
            if (ids := plan.input_ids.get(row)) is None:
                sampled_rows.append(row)
                sampled_offsets.append(offset)
            else:
                known[offset : offset + count] = ids
        token_ids = self._to_device(known)
        if sampled_rows:
            source = self._to_device(np.array(sampled_rows))
            token_ids[self._to_device(np.array(sampled_offsets))] = self.last_tokens[source]
        return token_ids

    def _attention_batch(
        self, rows: np.ndarray, counts: np.ndarray, seq_lens: np.ndarray, positions: np.ndarray
    ) -> AttentionBatch:
        blocks = self.block_table[np.repeat(rows, counts), positions // self.block_size]
        slots = blocks.astype(np.int64) * self.block_size + positions % self.block_size
        width = -(-int(seq_lens.max()) // self.block_size)
        multiple = np.flatnonzero(counts != 1)
        return AttentionBatch(
            num_decodes=int(multiple[0]) if len(multiple) else len(rows),
            query_lens=counts.tolist(),
            seq_lens=seq_lens.tolist(),
            block_table=self._to_device(self.block_table[rows, :width]),
            slot_mapping=self._to_device(slots),
            block_size=self.block_size,
        )

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.to(self.device, non_blocking=True)
