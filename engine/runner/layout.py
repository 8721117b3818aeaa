"""Which tokens of which rows a step computes, as arrays on the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.attention.backend import QUERY_TILE
from engine.step import StepPlan

_SHORTEST_SPAN = 128
"""Fewest keys worth a program of their own, unless a row has no more."""
_SPAN_STEP = 64
"""Spans are of so many keys or a multiple, as far as kernels go over them in tiles of so many."""
_MAX_SPANS = 32
"""Of one row, as their results are joined one after the other."""
_SHARES = np.array([1, 1.125, 1.25, 1.375, 1.5])
"""Lengths of spans to choose among, in parts of what an even division of all keys would give."""


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


def spans(lengths: np.ndarray, at_a_time: int) -> np.ndarray:
    """See `AttentionBatch.spans`.

    Where a row is long beside the others it has many, so that no program works on when all others
    have ended. Spans of rows that have several are at most twice `at_a_time`.

    Args:
        lengths: keys of each decode row, int64 [decodes].
        at_a_time: spans that fill the device.
    """
    order = (-lengths).argsort(kind="stable")[: np.count_nonzero(lengths)]
    keys = lengths[order]
    of_row = np.minimum(-(-keys // _span_length(keys, at_a_time)), _MAX_SPANS)
    before = (of_row.cumsum() - of_row).repeat(of_row)
    columns = (order.repeat(of_row), np.arange(len(before)) - before)
    counts = (of_row.repeat(of_row), keys.repeat(of_row))
    return np.stack((*columns, *counts), axis=1).astype(np.int32)


def _span_length(keys: np.ndarray, at_a_time: int) -> int:
    """The shortest length at which all spans are computed at a time, if there is such a one not
    much longer than an even division; else that of an even division."""
    lengths = np.maximum(keys.sum() * _SHARES / at_a_time, _SHORTEST_SPAN)
    lengths = -(-lengths // _SPAN_STEP) * _SPAN_STEP
    counts = np.ceil(keys / lengths[:, None]).sum(1)
    return int(lengths[(counts <= at_a_time).argmax()])


def most_spans(num_rows: int, at_a_time: int) -> int:
    """Spans that any `num_rows` rows have at most."""
    return min(num_rows * _MAX_SPANS, num_rows + at_a_time)
