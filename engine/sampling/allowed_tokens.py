"""Allowed tokens: all others are ruled out."""

from __future__ import annotations

import torch

from engine.sampling.rows import RELUCTANCE, Batch, RowTokens, to_device
from engine.step import NewRow


class AllowedTokens:
    """`SamplingParams.allowed_token_ids` of every row."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._allowed = RowTokens(num_rows, vocab_size, device)

    def add_row(self, new: NewRow) -> None:
        """Take over a row for a request."""
        allowed = new.params.allowed_token_ids or ()
        self._allowed.set(new.row, allowed, [0.0] * len(allowed))

    def active(self, batch: Batch) -> bool:
        """Whether any row of the batch names allowed tokens."""
        return batch.uses(self._allowed.rows)

    def apply(self, logits: torch.Tensor, batch: Batch) -> None:
        """Rule out, in the logits [batch, vocab], all tokens but those allowed, in place."""
        places = batch.members(self._allowed.rows)
        allowed = self._allowed.flat_index(batch.take(places), places)
        flat = logits.view(-1)
        kept = flat[allowed]
        # Twice as much as for bad words: rather one of these than a token that is not allowed.
        lower = logits.new_full((1, 1), -2 * RELUCTANCE).expand(len(places), logits.shape[1])
        logits.index_add_(0, to_device(places, self._device), lower)
        flat.scatter_(0, allowed, kept)
