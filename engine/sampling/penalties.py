"""Repetition, presence and frequency penalties.

Repetition after Keskar et al. 2019, "CTRL" (arXiv:1909.05858), section 4.1, with the sign handled
as in transformers; presence and frequency as OpenAI's API defines them.
"""

from __future__ import annotations

import numpy as np
import torch

from engine.sampling.rows import Batch, RowParameter, RowSelector, to_device
from engine.step import NewRow


class Penalties:
    """The penalties of every row, and the tokens that each penalised row has seen.

    Seen tokens are one int32 a token: twice the count in the output, plus one if the prompt holds
    it. The table [rows, vocab] is allocated when a penalised request comes, up to its row.
    """

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._num_rows = num_rows
        self._device = device
        self._repetition = RowParameter(num_rows, 1.0, device)
        self._presence = RowParameter(num_rows, 0.0, device)
        self._frequency = RowParameter(num_rows, 0.0, device)
        self._seen = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        self.rows: set[int] = set()
        """Rows with any penalty."""

    def add_row(self, new: NewRow) -> None:
        """Take over a row for a request, with the output tokens that it brings."""
        params = new.params
        self._repetition.set(new.row, params.repetition_penalty)
        self._presence.set(new.row, params.presence_penalty)
        self._frequency.set(new.row, params.frequency_penalty)
        parameters = (self._repetition, self._presence, self._frequency)
        if not any(new.row in parameter.rows for parameter in parameters):
            self.rows.discard(new.row)
            return
        self.rows.add(new.row)
        self._reserve(new.row + 1)
        tokens = np.asarray(new.token_ids, dtype=np.int64)
        prompt, output = np.split(tokens, [new.num_prompt_tokens])
        seen = 2 * np.bincount(output, minlength=self._seen.shape[1])
        seen[prompt] |= 1
        host = torch.from_numpy(seen.astype(np.int32))
        if self._device.type == "cuda":
            host = host.pin_memory()
        self._seen[new.row].copy_(host, non_blocking=True)

    def _reserve(self, num_rows: int) -> None:
        missing = num_rows - len(self._seen)
        if missing > 0:
            doubled = min(max(num_rows, 2 * len(self._seen)), self._num_rows)
            rows = self._seen.new_zeros((doubled - len(self._seen), self._seen.shape[1]))
            self._seen = torch.cat([self._seen, rows])

    def active(self, batch: Batch) -> bool:
        """Whether any row of the batch is penalised."""
        return not self.rows.isdisjoint(batch.rows)

    def apply(self, logits: torch.Tensor, batch: Batch) -> None:
        """Penalise the logits [batch, vocab] in place."""
        self._reserve(max(batch.rows) + 1)
        repetition = self._repetition.active(batch)
        for places, rows in batch.spans(self.rows):
            seen = self._seen[rows]
            if repetition:
                self._repeat(logits[places], seen, rows)
            if self._frequency.active(batch) or self._presence.active(batch):
                self._count(logits[places], seen >> 1, rows)

    def _repeat(self, logits: torch.Tensor, seen: torch.Tensor, rows: RowSelector) -> None:
        factor = torch.where(seen != 0, self._repetition.select(rows), 1.0)
        logits.copy_(torch.where(logits > 0, logits / factor, logits * factor))

    def _count(self, logits: torch.Tensor, counts: torch.Tensor, rows: RowSelector) -> None:
        logits.sub_(self._frequency.select(rows) * counts)
        logits.sub_(self._presence.select(rows) * (counts > 0))

    def update(self, token_ids: torch.Tensor, batch: Batch) -> None:
        """Count the tokens [batch] that the batch has just sampled, on the device."""
        places = batch.members(self.rows)
        rows = batch.take(places).row_index
        tokens = token_ids[to_device(places, self._device)]
        flat = rows * self._seen.shape[1] + tokens
        self._seen.view(-1).index_add_(0, flat, torch.full_like(flat, 2, dtype=torch.int32))
