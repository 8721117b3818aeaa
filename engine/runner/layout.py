"""Which tokens of which rows a step computes, as arrays on the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.attention.backend import QUERY_TILE
from engine.step import StepPlan


@dataclass(slots=True, frozen=True)
class Layout:
    """Rows and tokens of a step, padding included; R rows, T tokens, all int64."""

    rows: np.ndarray
    """Of the batch, [R]; 0 for padding."""
    counts: np.ndarray
    """Tokens that each row computes, [R]."""
    ends: np.ndarray
    """Where the tokens of each row end, [R]."""
    seq_lens: np.ndarray
    """Keys that each row's last token sees, [R]."""
    positions: np.ndarray
    """Of the tokens, [T]; 0 for padding."""
    owners: np.ndarray
    """Which of the R rows each token belongs to; tokens beyond are padding."""

    @classmethod
    def of(cls, plan: StepPlan, num_rows: int, num_tokens: int, of_padding: int = 0) -> Layout:
        """The plan's rows, padded.

        Args:
            plan: of the step.
            num_rows: R.
            num_tokens: T.
            of_padding: tokens that a row of padding computes.
        """
        padding = [0] * (num_rows - len(plan.rows))
        rows = np.array(plan.rows + padding, dtype=np.int64)
        counts = np.array(plan.num_tokens + [of_padding] * len(padding), dtype=np.int64)
        starts = np.array(plan.starts + padding, dtype=np.int64)
        ends, owners = counts.cumsum(), np.arange(num_rows).repeat(counts)
        positions = np.zeros(num_tokens, dtype=np.int64)
        positions[: len(owners)] = np.arange(len(owners)) + (starts - (ends - counts))[owners]
        return cls(rows, counts, ends, starts + counts, positions, owners)

    def tiles(self) -> np.ndarray:
        """See `AttentionBatch.tiles`."""
        (several,) = (self.counts > 1).nonzero()
        of_row = -(-self.counts[several] // QUERY_TILE)
        row = several.repeat(of_row)
        before = (of_row.cumsum() - of_row).repeat(of_row)
        first = (np.arange(len(row)) - before) * QUERY_TILE
        left = self.counts[row] - first
        position = self.seq_lens[row] - left
        order = (-position).argsort(kind="stable")
        columns = (row, self.ends[row] - left, np.minimum(left, QUERY_TILE), position)
        tiles: np.ndarray = np.array(columns, dtype=np.int32).T[order]
        return tiles


def most_tiles(num_tokens: int, num_rows: int) -> int:
    """Tiles that any `num_tokens` tokens of up to `num_rows` rows fit into."""
    return num_tokens // QUERY_TILE + min(num_rows, num_tokens // 2)
