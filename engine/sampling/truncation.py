"""top_k, top_p and min_p, all as one threshold a row below which tokens are dropped.

min_p after Nguyen et al. 2024 (arXiv:2407.01082), top_p (nucleus) after Holtzman et al. 2019
(arXiv:1904.09751). As in vLLM, min_p comes first, then top_k, and top_p counts the mass of what
these two leave. Tokens whose logits tie with the last one kept are kept as well, so the result does
not depend on the order of the vocabulary; only top_k = 1 is exact, because it is greedy.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from engine.sampling.rows import Batch, RowParameter, RowTable
from engine.step import NewRow

_CANDIDATES = (256, 4096)
"""Likeliest tokens among which the CPU looks for a threshold, before it sorts them all."""


class Truncation:
    """`top_k`, `top_p` and `min_p` of every row; greedy rows have none."""

    def __init__(self, table: RowTable, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._top_k = RowParameter(table, vocab_size, torch.int64)
        self._top_p = RowParameter(table, 1.0)
        self._log_min_p = RowParameter(table, -math.inf)

    def add_row(self, new: NewRow) -> None:
        """Take over a row for a request."""
        params, row = new.params, new.row
        keeps_all = params.greedy or not 0 < params.top_k < self._vocab_size
        self._top_k.set(row, self._vocab_size if keeps_all else params.top_k)
        self._top_p.set(row, 1.0 if params.greedy else params.top_p)
        is_relative = params.min_p > 0.0 and not params.greedy
        self._log_min_p.set(row, math.log(params.min_p) if is_relative else -math.inf)

    def active(self, batch: Batch) -> bool:
        """Whether any row of the batch drops tokens."""
        return any(p.active(batch) for p in (self._top_k, self._top_p, self._log_min_p))

    def group(self, places: list[int], batch: Batch) -> list[int]:
        """Reorder places so that rows that drop tokens come first and share their chunks."""
        users = self._top_k.rows | self._top_p.rows | self._log_min_p.rows
        return sorted(places, key=lambda place: batch.rows[place] not in users)

    def apply(self, logits: torch.Tensor, batch: Batch) -> None:
        """Set dropped tokens to -inf in place, on the CPU; logits [batch, vocab] / temperature."""
        rows = batch.row_index
        threshold = torch.full_like(logits[:, :1], -torch.inf)
        if self._log_min_p.active(batch):
            threshold = logits.amax(dim=-1, keepdim=True) + self._log_min_p.select(rows)
        if self._top_k.active(batch) or self._top_p.active(batch):
            top_k, top_p = self._top_k.select(rows), self._top_p.select(rows)
            threshold = by_candidates(logits, top_k, top_p, threshold)
        logits.masked_fill_(logits < threshold, -torch.inf)

    def threshold(
        self, logits: torch.Tensor, batch: Batch, temperature: RowParameter
    ) -> torch.Tensor:
        """What logits / temperature must reach, in one launch; float32 [batch]."""
        from engine.kernels.truncate import truncation_threshold

        return truncation_threshold(
            logits,
            batch.row_index,
            temperature.values,
            self._top_k.values,
            self._top_p.values,
            self._log_min_p.values,
        )


def by_candidates(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, floor: torch.Tensor
) -> torch.Tensor:
    """The smallest logit that each row keeps, on the CPU: looks among its likeliest tokens.

    Rows whose answer is not among them are tried again with more, and with all at last.

    Args:
        logits: float32 [rows, vocab].
        top_k: int64 [rows, 1], from 1 to vocab.
        top_p: float32 [rows, 1]; 1 drops nothing.
        floor: float32 [rows, 1]; tokens below it are dropped already.

    Returns:
        float32 [rows, 1], not below `floor`.
    """
    vocab_size = logits.shape[1]
    threshold = torch.empty_like(floor)
    rest = torch.arange(len(logits))
    for count in (*(count for count in _CANDIDATES if count < vocab_size), vocab_size):
        arguments = (logits[rest], top_k[rest], top_p[rest], floor[rest])
        threshold[rest], settled = _among_likeliest(*arguments, count)
        rest = rest[~settled]
        if not len(rest):
            break
    return threshold


def _among_likeliest(
    logits: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    floor: torch.Tensor,
    count: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Thresholds, float32 [rows, 1], and for which rows `count` candidates suffice, bool [rows]."""
    vocab_size = logits.shape[1]
    likeliest = _sort(logits) if count == vocab_size else logits.topk(count, dim=-1).values
    kth = likeliest.gather(-1, top_k.clamp(max=count) - 1)
    floor = torch.where(top_k <= count, floor.maximum(kth), floor)
    nucleus = top_p < 1.0
    covered = _mass(likeliest, floor).cumsum(dim=-1)
    total = covered[:, -1:]
    # Tokens that are kept so far but are no candidates belong to the total as well.
    if count < vocab_size and bool((nucleus & (floor <= likeliest[:, -1:])).any()):
        total = _mass(logits, floor).sum(dim=-1, keepdim=True)
    target = total * top_p
    last = (covered < target).sum(dim=-1, keepdim=True).clamp_(max=count - 1)
    threshold = torch.where(nucleus, floor.maximum(likeliest.gather(-1, last)), floor)
    known_k = (top_k <= count) | (top_k == vocab_size)
    settled = known_k & (~nucleus | (covered[:, -1:] >= target) | (count == vocab_size))
    return threshold, settled.squeeze(-1)


def _sort(logits: torch.Tensor) -> torch.Tensor:
    """Logits of each row from the largest; NumPy sorts with SIMD, in a third of torch's time."""
    return torch.from_numpy(np.sort(logits.neg().numpy(), axis=-1)).neg_()


def _mass(logits: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    """Probabilities relative to the likeliest; 0 below `floor`. `logits` hold the row's largest."""
    mass = (logits - logits.amax(dim=-1, keepdim=True)).exp_()
    return mass.masked_fill_(logits < floor, 0.0)
