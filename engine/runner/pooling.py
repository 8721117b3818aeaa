"""Pools hidden states of rows that give a vector in place of a token."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.sampling.rows import Batch, to_device
from engine.step import NewRow, StepPlan


@dataclass(slots=True)
class PooledRows:
    """Vectors of a step; on the device they may not be computed yet."""

    places: list[int]
    """Among the rows that sample."""
    vectors: torch.Tensor
    """float32 [len(places), hidden]."""

    def to_pinned(self) -> PooledRows:
        """Copies in pinned host memory, complete once the device has come so far."""
        host = torch.empty(self.vectors.shape, dtype=torch.float32, pin_memory=True)
        return PooledRows(self.places, host.copy_(self.vectors, non_blocking=True))

    def to_host(self) -> dict[int, bytes]:
        """Place → its vector, float32 little-endian. Waits for the device, unless it is pinned."""
        vectors = self.vectors.cpu().numpy().astype("<f4", copy=False)
        return {place: vectors[i].tobytes() for i, place in enumerate(self.places)}


class Pooler:
    """Keeps, on the device, what the chunks of a prompt add up to.

    Of a row that is given away before its prompt was computed nothing stays: whoever is preempted
    is computed anew from its first token.
    """

    def __init__(self) -> None:
        self._rows: dict[int, NewRow] = {}
        """Rows that give a vector, until they have."""
        self._sums: dict[int, torch.Tensor | None] = {}
        """Those of them that average, and what their hidden states come to so far: float32
        [hidden], None before the first."""

    def add_row(self, new_row: NewRow) -> None:
        """Give a row to a request, new or resumed, whether it is pooled or not."""
        row = new_row.row
        self._rows.pop(row, None)
        self._sums.pop(row, None)
        if new_row.pooling is not None:
            self._rows[row] = new_row
        if new_row.pooling == "mean":
            self._sums[row] = None

    def needs_all(self, plan: StepPlan) -> bool:
        """Whether a step's hidden states are needed of all tokens, not only before samples."""
        return bool(self._sums) and not self._sums.keys().isdisjoint(plan.rows)

    def accumulate(self, plan: StepPlan, hidden: torch.Tensor) -> None:
        """Take in the hidden states of all of a step's tokens, [tokens, hidden]."""
        offset = 0
        for row, count in zip(plan.rows, plan.num_tokens, strict=True):
            if row in self._sums:
                total = self._sums[row]
                chunk = hidden[offset : offset + count].sum(dim=0, dtype=torch.float32)
                self._sums[row] = chunk if total is None else total + chunk
            offset += count

    def pool(self, batch: Batch, hidden: torch.Tensor) -> PooledRows | None:
        """The vectors of those rows whose prompts end with this step.

        Args:
            batch: the rows that sample.
            hidden: of the tokens that the samples would follow, [batch, hidden].
        """
        places = batch.members(self._rows.keys())
        if not places:
            return None
        vectors = hidden[to_device(places, hidden.device)].float()
        for vector, place in zip(vectors, places, strict=True):
            new_row = self._rows.pop(batch.rows[place])
            total = self._sums.pop(new_row.row, None)
            if total is not None:
                torch.div(total, new_row.num_prompt_tokens, out=vector)
        return PooledRows(places, vectors)
