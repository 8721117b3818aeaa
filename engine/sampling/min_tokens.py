"""Minimum length: no token that would stop the output before `min_tokens` of it."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from engine.sampling.rows import Batch, RowTokens
from engine.step import NewRow


class MinTokens:
    """`SamplingParams.min_tokens` of every row.

    The host knows how long each output is from the position that is sampled, so the device is only
    asked while a row is still too short.
    """

    def __init__(
        self, num_rows: int, vocab_size: int, device: torch.device, eos_token_ids: Iterable[int]
    ) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = frozenset(eos_token_ids)
        self._stops = RowTokens(num_rows, vocab_size, device)
        self._first_free: dict[int, int] = {}
        """Row → the first position at which it may stop."""

    def add_row(self, new: NewRow) -> None:
        """Take over a row for a request."""
        params = new.params
        ends = set(params.stop_token_ids)
        if not params.ignore_eos:
            ends |= self._eos_token_ids
        # Ids beyond the vocabulary cannot be sampled; as an index they would hit another row.
        stops = sorted(i for i in ends if i < self._vocab_size) if params.min_tokens else []
        if params.structured_outputs is not None:
            stops = []  # its masks see to it, as they know whether anything else is allowed
        self._stops.set(new.row, stops, [-torch.inf] * len(stops))
        self._first_free[new.row] = new.num_prompt_tokens + params.min_tokens

    def active(self, batch: Batch) -> bool:
        """Whether any row of the batch is too short to stop."""
        return bool(self._too_short(batch))

    def apply(self, logits: torch.Tensor, batch: Batch) -> None:
        """Set the logits [batch, vocab] of stop tokens to -inf in place, for rows too short."""
        self._stops.add_to(logits, batch, self._too_short(batch))

    def _too_short(self, batch: Batch) -> list[int]:
        return [
            place
            for place in batch.members(self._stops.rows)
            if batch.positions[place] < self._first_free[batch.rows[place]]
        ]
