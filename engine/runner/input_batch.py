"""Row state that lives across steps, and the input tensors of one step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine.attention.backend import AttentionBatch
from engine.attention.spans import SpanPlan
from engine.runner.layout import Layout, most_tiles
from engine.runner.staging import Staging
from engine.sampling.rows import Batch
from engine.step import StepPlan

_BYTES_PER_TOKEN = 4 * 8 + 1
_BYTES_PER_ROW = 9 * 8
_OTHER_BYTES = 1024
"""What comes once in a step, and what aligns its arrays."""
_NO_SPANS = SpanPlan(0)
WHOLE_TABLE_BYTES = 1 << 18
"""Up to so many bytes, a graph's block table is uploaded whole: that takes no longer than a launch.

1,024 rows of 4,096 tokens have as many, in blocks of 64.
"""
MAX_PADDED_ROWS = 256
"""Most rows of a padded batch."""


@dataclass(slots=True)
class StepInputs:
    """Tensors of one step; T tokens, S sampling rows."""

    known_tokens: torch.Tensor
    """Tokens that the host knows, int64 [T]."""
    token_sources: torch.Tensor
    """Row whose last sampled token is meant instead, or -1; int64 [T]."""
    positions: torch.Tensor
    """int64 [T]."""
    attention: AttentionBatch
    samples: Batch
    """Rows that sample, in the plan's order, and the sequence indices of the tokens."""
    sample_indices: torch.Tensor
    """Which of the T tokens the samples follow, int64 [S]; in a graph one for each of its rows, of
    which the first S count."""


class InputBatch:
    """Block tables and last sampled tokens by row.

    The last sampled tokens live on the device, so that a step can be launched before the host
    knows what the step before it sampled.

    Args:
        max_num_seqs: rows.
        max_blocks_per_seq: of the block table.
        block_size: tokens in a block.
        max_tokens: of a step.
        device: where the model runs.
        spans: divides the keys of decode rows.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_blocks_per_seq: int,
        block_size: int,
        max_tokens: int,
        device: torch.device,
        spans: SpanPlan = _NO_SPANS,
    ) -> None:
        self.block_size = block_size
        self.device = device
        self._span_plan = spans
        self.block_table = np.zeros((max_num_seqs, max_blocks_per_seq), dtype=np.int32)
        self.last_tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._graph_table = torch.zeros(self.block_table.shape, dtype=torch.int32, device=device)
        tokens = max(max_tokens, max_num_seqs)
        row_bytes = _BYTES_PER_ROW + 4 * max_blocks_per_seq
        other_bytes = 16 * spans.at_a_time + _OTHER_BYTES
        capacity = tokens * _BYTES_PER_TOKEN + max_num_seqs * row_bytes + other_bytes
        self._staging = Staging(capacity, device)

    def build(self, plan: StepPlan) -> StepInputs:
        """Take in the plan's new blocks and lay out its tokens."""
        self._take_blocks(plan)
        layout = Layout.of(plan, len(plan.rows), plan.total_tokens)
        width = -(-int(layout.seq_lens.max()) // self.block_size)
        return self._upload(plan, layout, self.block_table[layout.rows, :width], layout.tiles())

    def build_decode(self, plan: StepPlan, size: int) -> StepInputs:
        """The same for rows that compute and sample one token each, padded to `size` rows.

        Padding computes token 0 at position 0 of the null block. Tensors depend on `size` alone in
        shape and address; what the block table holds beyond the longest sequence is undefined.
        """
        self._take_blocks(plan)
        layout = Layout.of(plan, size, size, of_padding=1)
        return self._upload_for_graph(plan, layout, layout.tiles())

    def build_padded(self, plan: StepPlan, size: int) -> StepInputs:
        """The same for any rows, padded to `size` tokens and `padded_rows(size)` rows.

        Padding rows compute nothing.
        """
        self._take_blocks(plan)
        layout = Layout.of(plan, self.padded_rows(size), size)
        needed = layout.tiles()
        tiles = np.zeros((most_tiles(size, len(layout.rows)), 4), dtype=np.int32)
        tiles[: len(needed)] = needed
        return self._upload_for_graph(plan, layout, tiles)

    def padded_rows(self, size: int) -> int:
        """Rows of a padded batch of `size` tokens."""
        return min(size, len(self.block_table), MAX_PADDED_ROWS)

    def input_tokens(self, inputs: StepInputs) -> torch.Tensor:
        """Tokens that the step computes, int64 [T]."""
        if self.device.type == "cuda":
            from engine.kernels.tokens import take_tokens

            return take_tokens(inputs.known_tokens, inputs.token_sources, self.last_tokens)
        sources = inputs.token_sources
        return torch.where(sources < 0, inputs.known_tokens, self.last_tokens[sources])

    def store_sampled(self, inputs: StepInputs, token_ids: torch.Tensor) -> None:
        """Keep what the step sampled (int64 [S], on the device) as input of the next steps."""
        self.last_tokens[inputs.samples.row_index] = token_ids

    def _take_blocks(self, plan: StepPlan) -> None:
        for row, (first, blocks) in plan.new_blocks.items():
            self.block_table[row, first : first + len(blocks)] = blocks

    def _upload_for_graph(self, plan: StepPlan, layout: Layout, tiles: np.ndarray) -> StepInputs:
        """Upload with shapes and addresses that do not depend on the plan."""
        whole = self.block_table[layout.rows[:1]].nbytes * len(layout.rows) <= WHOLE_TABLE_BYTES
        width = None if whole else int(layout.seq_lens.max(initial=1) - 1) // self.block_size + 1
        table = self.block_table[layout.rows, :width]
        table[len(plan.rows) :] = 0
        inputs = self._upload(plan, layout, table, tiles, in_graph=True)
        if not whole:
            inputs.attention.block_table = self._spread(inputs.attention.block_table)
        return inputs

    def _slots(self, layout: Layout, table: np.ndarray) -> np.ndarray:
        """Cache slot of each token, int64 [T]; padding writes to the null block."""
        blocks = np.zeros(len(layout.positions), dtype=np.int64)
        of_token = layout.positions[: len(layout.owners)] // self.block_size
        blocks[: len(layout.owners)] = table[layout.owners, of_token]
        slots: np.ndarray = blocks * self.block_size + layout.positions % self.block_size
        return slots

    def _spread(self, table: torch.Tensor) -> torch.Tensor:
        """Copy the columns in use to where graphs look for them, rows far apart.

        It is done on the device, as torch may wait for it when it copies such rows from the host.
        """
        rows, columns = table.shape
        self._graph_table[:rows, :columns] = table
        return self._graph_table[:rows]

    def _spans(self, lengths: np.ndarray, in_graph: bool) -> np.ndarray:
        """Spans of decode rows; in a graph as many as so many rows may have."""
        found = self._span_plan.divide(lengths)
        if not in_graph:
            return found
        padded = np.zeros((self._span_plan.most(len(lengths)), 4), dtype=np.int32)
        padded[:, 2] = 1
        padded[: len(found)] = found
        return padded

    def _upload(
        self,
        plan: StepPlan,
        layout: Layout,
        table: np.ndarray,
        tiles: np.ndarray,
        in_graph: bool = False,
    ) -> StepInputs:
        """Bring it all to the device."""
        rows, counts, seq_lens, ends = layout.rows, layout.counts, layout.seq_lens, layout.ends
        known, sources = _tokens(plan, len(layout.positions), ends - counts)
        decodes = _num_decodes(counts)
        decode_lens = np.where(counts == 1, seq_lens, 0) if in_graph else seq_lens[:decodes]
        count = sum(plan.samples)
        samples = np.zeros(len(rows) if in_graph else count, dtype=np.int64)
        (samples[:count],) = np.array(plan.samples).nonzero()
        tensors = self._staging.upload(
            [
                known,
                sources,
                layout.positions,
                self._slots(layout, table),
                decode_lens.astype(np.int32),
                self._spans(decode_lens, in_graph),
                tiles,
                np.array([np.count_nonzero(tiles[:, 2])], dtype=np.int32),
                rows[samples],
                seq_lens[samples],
                ends[samples] - 1,
                # Last, as graphs need the others at places that these do not move.
                table,
                _starts(counts[decodes:]),
                _starts(seq_lens[decodes:]),
            ]
        )
        attention = AttentionBatch(
            num_decodes=len(decode_lens),
            query_lens=counts.tolist(),
            seq_lens=seq_lens.tolist(),
            block_table=tensors[11],
            slot_mapping=tensors[3],
            block_size=self.block_size,
            decode_lens=tensors[4],
            query_starts=tensors[12],
            key_starts=tensors[13],
            spans=tensors[5],
            tiles=tensors[6],
            num_tiles=tensors[7],
            padded=in_graph and len(tiles) > 0,
        )
        chosen = samples[:count]
        return StepInputs(
            known_tokens=tensors[0],
            token_sources=tensors[1],
            positions=tensors[2],
            attention=attention,
            samples=_batch(rows[chosen], seq_lens[chosen], tensors[8][:count], tensors[9][:count]),
            sample_indices=tensors[10],
        )


def _num_decodes(counts: np.ndarray) -> int:
    """Leading rows that compute one token."""
    (others,) = (counts != 1).nonzero()
    return int(others[0]) if len(others) else len(counts)


def _batch(
    rows: np.ndarray, positions: np.ndarray, row_index: torch.Tensor, position_index: torch.Tensor
) -> Batch:
    """The rows that sample and the sequence indices of the tokens, on the host and the device."""
    return Batch(
        rows.tolist(),
        positions.tolist(),
        row_index.device,
        row_index=row_index,
        position_index=position_index,
    )


def _tokens(plan: StepPlan, count: int, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that the host knows, and the rows whose last token is wanted; int64 [count] each."""
    known = np.zeros(count, dtype=np.int64)
    sources = np.full(count, -1, dtype=np.int64)
    if not plan.input_ids:  # a decode step like most
        sources[: len(plan.rows)] = plan.rows
        return known, sources
    for row, offset in zip(plan.rows, offsets.tolist(), strict=False):  # padding has offsets too
        ids = plan.input_ids.get(row)
        if ids is None:
            sources[offset] = row
        else:
            known[offset : offset + len(ids)] = ids
    return known, sources


def _starts(lengths: np.ndarray) -> np.ndarray:
    """Running sum from 0, int32 [len(lengths) + 1]."""
    total = np.zeros(len(lengths) + 1, dtype=np.int32)
    lengths.cumsum(out=total[1:])
    return total
