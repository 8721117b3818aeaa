"""What the sampling features share: a step's rows, and parameters kept by row on the device."""

from __future__ import annotations

from collections.abc import Sequence, Set
from functools import cached_property

import numpy as np
import torch

RELUCTANCE = 2.0**20
"""Taken off the logits of tokens that are ruled out. Nothing else makes such a difference: a bias
takes 100, a penalty 2 for each token of the output. Yet it is finite and leaves logits in their
order, for steps in which all the rest is masked."""
RowSelector = slice | torch.Tensor
"""Picks rows of a table: a slice of neighbours, or an int64 tensor of row numbers."""


def to_device(
    values: Sequence[int] | Sequence[float],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Copy host numbers to the device without waiting for it (int64 or float32, [len(values)]).

    Pinned memory lets the copy queue behind the kernels in flight; a pageable one would wait for
    them.
    """
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


class Batch:
    """Rows that sample in one step; `rows[i]` draws the token at index `positions[i]`.

    Args:
        rows: each row at most once.
        positions: as many.
        device: where the logits come from.
        row_index: `rows`, int64 [batch], if they are on the device already.
        position_index: the same of `positions`.
    """

    def __init__(
        self,
        rows: list[int],
        positions: list[int],
        device: torch.device,
        row_index: torch.Tensor | None = None,
        position_index: torch.Tensor | None = None,
    ) -> None:
        self.rows = rows
        self.positions = positions
        self.device = device
        self.fused = device.type == "cuda"
        """Whether Triton kernels work on all rows at once, instead of torch on those concerned."""
        if row_index is not None:
            self.row_index = row_index
        if position_index is not None:
            self.position_index = position_index

    @cached_property
    def row_index(self) -> torch.Tensor:
        """`rows` on the device, int64 [batch]."""
        return to_device(self.rows, self.device)

    @cached_property
    def position_index(self) -> torch.Tensor:
        """`positions` on the device, int64 [batch]."""
        return to_device(self.positions, self.device)

    def uses(self, users: Set[int]) -> bool:
        """Whether any row is one of `users`."""
        return bool(users) and not users.isdisjoint(self.rows)

    def members(self, users: Set[int]) -> list[int]:
        """Places in the batch whose row is one of `users`."""
        if not self.uses(users):
            return []
        return [place for place, row in enumerate(self.rows) if row in users]

    def take(self, places: list[int]) -> Batch:
        """The part of the batch at `places`."""
        rows = [self.rows[place] for place in places]
        return Batch(rows, [self.positions[place] for place in places], self.device)


class RowTable:
    """Numbers of every row, side by side, so that one copy brings all new ones to the device.

    Args:
        num_rows: rows.
        num_columns: most parameters of a row.
        device: where they are read; on the CPU that is where they are written.
    """

    def __init__(self, num_rows: int, num_columns: int, device: torch.device) -> None:
        self._staged = torch.zeros((num_rows, num_columns), dtype=torch.int64)
        self._values = self._staged.to(device)
        self._free = list(range(num_columns))
        self.changed = False
        """Whether anything was staged since the last upload."""

    def add_column(self, dtype: torch.dtype) -> tuple[np.ndarray, torch.Tensor]:
        """Room for a parameter of 4 or 8 bytes: to stage it [rows], and on the device [rows, 1]."""
        column = self._free.pop() * (8 // dtype.itemsize)
        staged = self._staged.view(dtype)[:, column].numpy()
        return staged, self._values.view(dtype)[:, column : column + 1]

    def upload(self) -> None:
        """Bring what was staged to the device, behind the steps in flight."""
        if self.changed and self._values.device.type == "cuda":
            self._values.copy_(self._staged.pin_memory(), non_blocking=True)
        self.changed = False


class RowParameter:
    """One number a row; the host knows which rows differ from the neutral value."""

    def __init__(self, table: RowTable, neutral: float, dtype: torch.dtype = torch.float) -> None:
        self._table = table
        self._neutral = neutral
        self._staged, self.values = table.add_column(dtype)
        """`values` are on the device, [rows, 1], and true after the table's next upload."""
        self._staged[:] = neutral
        table.changed = True
        self.rows: set[int] = set()
        """Rows whose value is not neutral."""

    def set(self, row: int, value: float) -> None:
        """Stage the value of a row, over that of the row's last request."""
        if value != self._neutral:
            self.rows.add(row)
        elif row in self.rows:
            self.rows.remove(row)
        else:
            return
        self._staged[row] = value
        self._table.changed = True

    def active(self, batch: Batch) -> bool:
        """Whether any row of the batch has a value of its own."""
        return batch.uses(self.rows)

    def select(self, rows: RowSelector) -> torch.Tensor:
        """Values of the rows, [rows, 1]."""
        return self.values[rows]


class RowTokens:
    """A short list of (token id, value) pairs a row, on the device, padded to a common width.

    The table is allocated when a row first needs it and widens as longer lists come.
    """

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._num_rows = num_rows
        self._vocab_size = vocab_size
        self._device = device
        self._ids = torch.empty((num_rows, 0), dtype=torch.int64, device=device)
        self._values = torch.empty((num_rows, 0), dtype=torch.float, device=device)
        self.rows: set[int] = set()
        """Rows that have a list."""

    def set(self, row: int, ids: Sequence[int], values: Sequence[float]) -> None:
        """Store a row's pairs, over those of the row's last request; no pairs clear it.

        The pad repeats the first id with the value 0.
        """
        self.rows.discard(row)
        if not ids:
            return
        self.rows.add(row)
        if len(ids) > self._ids.shape[1]:
            self._widen(len(ids))
        pad = self._ids.shape[1] - len(ids)
        self._ids[row] = to_device([*ids, *[ids[0]] * pad], self._device)
        self._values[row] = to_device([*map(float, values), *[0.0] * pad], self._device)

    def _widen(self, length: int) -> None:
        width = 1 << (length - 1).bit_length()
        shape = (self._num_rows, width - self._ids.shape[1])
        # Rows that are in use keep their first id as the pad; an empty table has none to repeat.
        pad_ids = (
            self._ids[:, :1].expand(shape)
            if self._ids.shape[1]
            else torch.zeros(shape, dtype=torch.int64, device=self._device)
        )
        pad_values = torch.zeros(shape, dtype=torch.float, device=self._device)
        # Both or neither: memory may run out between.
        ids = torch.cat([self._ids, pad_ids], dim=1)
        self._values = torch.cat([self._values, pad_values], dim=1)
        self._ids = ids

    def add_to(self, logits: torch.Tensor, batch: Batch, places: list[int]) -> None:
        """Add the values to the logits [batch, vocab] of the rows at `places`, in place."""
        part = batch.take(places)
        flat_index = self.flat_index(part, places)
        logits.view(-1).scatter_add_(0, flat_index, self._values[part.row_index].view(-1))

    def flat_index(self, part: Batch, places: list[int]) -> torch.Tensor:
        """Where the ids of the rows of `part` lie in logits [batch, vocab] in which these have
        `places`; int64 [rows · width], the pad included."""
        starts = to_device([place * self._vocab_size for place in places], self._device)
        return (self._ids[part.row_index] + starts[:, None]).view(-1)
