"""How the keys of decode rows are divided among programs that run at the same time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_SHORTEST = 128
"""Fewest keys by which a row is divided; what is left over at its end may be fewer."""
_STEP = 64
"""Spans are of a multiple of so many keys: the kernel's tile at heads of 128 in two bytes. For
others the kernel rounds up to its own."""
_MOST_OF_ROW = 32
"""As the results of a row's spans are joined one after the other."""
_SHARES = np.array([1, 1.125, 1.25, 1.375, 1.5])
"""Lengths of spans to choose among, in parts of what an even division of all keys would give."""


@dataclass(slots=True, frozen=True)
class SpanPlan:
    """Divides rows so that all programs end at about the same time, however uneven the lengths."""

    at_a_time: int
    """Spans that fill the device; 0 if nobody asks for any."""
    window: int | None = None
    """Keys that a query sees, itself included; None sees all."""

    def divide(self, lengths: np.ndarray) -> np.ndarray:
        """See `AttentionBatch.spans`.

        Args:
            lengths: keys of each decode row, int64 [decodes].
        """
        if self.at_a_time == 0 or not lengths.any():
            return np.zeros((0, 4), dtype=np.int32)
        seen = lengths if self.window is None else np.minimum(lengths, self.window)
        order = (-seen).argsort(kind="stable")[: np.count_nonzero(seen)]
        keys = seen[order]
        of_row = np.minimum(-(-keys // self._length(keys)), _MOST_OF_ROW)
        before = (of_row.cumsum() - of_row).repeat(of_row)
        columns = (order.repeat(of_row), np.arange(len(before)) - before)
        counts = (of_row.repeat(of_row), lengths[order].repeat(of_row))
        return np.stack((*columns, *counts), axis=1).astype(np.int32)

    def _length(self, keys: np.ndarray) -> int:
        """The shortest length at which all spans are computed at a time, if there is such a one not
        much longer than an even division; else that of an even division."""
        lengths = np.maximum(keys.sum() * _SHARES / self.at_a_time, _SHORTEST)
        lengths = -(-lengths // _STEP) * _STEP
        counts = np.ceil(keys / lengths[:, None]).sum(1)
        return int(lengths[(counts <= self.at_a_time).argmax()])

    def most(self, num_rows: int) -> int:
        """Spans that any `num_rows` rows have at most."""
        if self.at_a_time == 0:
            return 0
        return min(num_rows * _MOST_OF_ROW, num_rows + self.at_a_time)
