"""Logit bias: a number added to the logits of chosen tokens."""

from __future__ import annotations

import torch

from engine.sampling.rows import Batch, RowTokens
from engine.step import NewRow


class LogitBias:
    """`SamplingParams.logit_bias` of every row."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._bias = RowTokens(num_rows, vocab_size, device)

    def add_row(self, new: NewRow) -> None:
        """Take over a row for a request."""
        bias = new.params.logit_bias or {}
        self._bias.set(new.row, list(bias), list(bias.values()))

    def active(self, batch: Batch) -> bool:
        """Whether any row of the batch has a bias."""
        return batch.uses(self._bias.rows)

    def apply(self, logits: torch.Tensor, batch: Batch) -> None:
        """Add the biases to the logits [batch, vocab] in place."""
        self._bias.add_to(logits, batch, batch.members(self._bias.rows))
