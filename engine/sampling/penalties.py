"""Repetition, presence and frequency penalties.

Repetition after Keskar et al. 2019, "CTRL" (arXiv:1909.05858), section 4.1, with the sign handled
as in transformers; presence and frequency as OpenAI's API defines them.
"""

from __future__ import annotations

import torch

from engine.sampling.rows import Batch, RowParameter, RowTable, to_device
from engine.step import NewRow


class Penalties:
    """The penalties of every row, and the tokens that each penalised row has seen.

    Seen tokens are one int32 a token: twice the count in the output, plus one if the prompt holds
    it. The table [rows, vocab] is allocated when a penalised request comes, up to its row.
    """

    def __init__(
        self, table: RowTable, num_rows: int, vocab_size: int, device: torch.device
    ) -> None:
        self._num_rows = num_rows
        self._device = device
        self._repetition = RowParameter(table, 1.0)
        self._presence = RowParameter(table, 0.0)
        self._frequency = RowParameter(table, 0.0)
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
        tokens = to_device(new.token_ids, self._device, torch.int64)
        prompt, output = tokens.tensor_split([new.num_prompt_tokens])
        seen = self._seen[new.row].zero_()
        seen.index_fill_(0, prompt, 1)
        seen.index_add_(0, output, torch.full_like(output, 2, dtype=torch.int32))

    def _reserve(self, num_rows: int) -> None:
        missing = num_rows - len(self._seen)
        if missing > 0:
            doubled = min(max(num_rows, 2 * len(self._seen)), self._num_rows)
            rows = self._seen.new_zeros((doubled - len(self._seen), self._seen.shape[1]))
            self._seen = torch.cat([self._seen, rows])

    def active(self, batch: Batch) -> bool:
        """Whether any row of the batch is penalised."""
        return batch.uses(self.rows)

    def apply(self, logits: torch.Tensor, batch: Batch) -> None:
        """Penalise the logits [batch, vocab] in place; contiguous float32."""
        if batch.fused:
            from engine.kernels.penalties import apply_penalties

            apply_penalties(logits, *self._tables(batch))
            return
        # One by one: temporaries stay in the cache, and other rows cost nothing.
        for place in batch.members(self.rows):
            row = batch.rows[place]
            self._penalise(logits[place], self._seen[row], row)

    def _tables(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        parameters = (self._repetition, self._presence, self._frequency)
        return batch.row_index, self._seen, *(parameter.values for parameter in parameters)

    def _penalise(self, logits: torch.Tensor, seen: torch.Tensor, row: int) -> None:
        if row in self._repetition.rows:
            factor = torch.where(seen != 0, self._repetition.values[row], 1.0)
            logits.copy_(torch.where(logits > 0, logits / factor, logits * factor))
        if row in self._frequency.rows or row in self._presence.rows:
            counts = seen >> 1
            logits.sub_(self._frequency.values[row] * counts)
            logits.sub_(self._presence.values[row] * (counts > 0))

    def update(self, token_ids: torch.Tensor, batch: Batch) -> None:
        """Count the tokens [batch] that the batch has just sampled, on the device."""
        if batch.fused:
            from engine.kernels.penalties import count_tokens

            count_tokens(token_ids, *self._tables(batch))
            return
        places = batch.members(self.rows)
        flat = batch.take(places).row_index * self._seen.shape[1] + token_ids[places]
        self._seen.view(-1).index_add_(0, flat, torch.full_like(flat, 2, dtype=torch.int32))
