"""top_k, top_p and min_p, all as one threshold a row below which tokens are dropped.

min_p after Nguyen et al. 2024 (arXiv:2407.01082), top_p (nucleus) after Holtzman et al. 2019
(arXiv:1904.09751). As in vLLM, min_p comes first, then top_k, and top_p counts the mass of what
these two leave. Tokens whose logits tie with the last one kept are kept as well, so the result does
not depend on the order of the vocabulary; only top_k = 1 is exact, because it is greedy.
"""

from __future__ import annotations

import numpy as np
import torch

from engine.sampling.rows import Batch, RowParameter
from engine.step import NewRow

_CANDIDATES = (256, 4096)
"""Likeliest tokens among which the CPU looks for a threshold, before it sorts them all."""


class Truncation:
    """`top_k`, `top_p` and `min_p` of every row."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._top_k = RowParameter(num_rows, vocab_size, device, torch.int64)
        self._top_p = RowParameter(num_rows, 1.0, device)
        self._min_p = RowParameter(num_rows, 0.0, device)

    def add_row(self, new: NewRow) -> None:
        """Take over a row for a request."""
        top_k = new.params.top_k
        self._top_k.set(new.row, min(top_k, self._vocab_size) if top_k > 0 else self._vocab_size)
        self._top_p.set(new.row, new.params.top_p)
        self._min_p.set(new.row, new.params.min_p)

    def active(self, batch: Batch) -> bool:
        """Whether any row of the batch drops tokens."""
        return any(p.active(batch) for p in (self._top_k, self._top_p, self._min_p))

    def group(self, places: list[int], batch: Batch) -> list[int]:
        """Reorder places so that rows that drop tokens come first and share their chunks."""
        users = self._top_k.rows | self._top_p.rows | self._min_p.rows
        return sorted(places, key=lambda place: batch.rows[place] not in users)

    def apply(self, logits: torch.Tensor, batch: Batch) -> None:
        """Set dropped tokens to -inf in place; logits [batch, vocab] after temperature."""
        rows = batch.row_index
        threshold = torch.full_like(logits[:, :1], -torch.inf)
        if self._min_p.active(batch):
            threshold = logits.amax(dim=-1, keepdim=True) + self._min_p.select(rows).log()
        if self._top_k.active(batch) or self._top_p.active(batch):
            find = by_candidates if logits.device.type == "cpu" else by_search
            threshold = find(logits, self._top_k.select(rows), self._top_p.select(rows), threshold)
        logits.masked_fill_(logits < threshold, -torch.inf)


def by_search(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, floor: torch.Tensor
) -> torch.Tensor:
    """The smallest logit that each row keeps, without a sort and without waiting for the device.

    Args:
        logits: float32 [rows, vocab].
        top_k: int64 [rows, 1], from 1 to vocab.
        top_p: float32 [rows, 1]; 1 drops nothing.
        floor: float32 [rows, 1]; tokens below it are dropped already.

    Returns:
        float32 [rows, 1], not below `floor`.
    """
    floor = floor.maximum(_search(logits, torch.ones_like(logits), top_k))
    mass = _mass(logits, floor)
    nucleus = _search(logits, mass, mass.sum(dim=-1, keepdim=True) * top_p)
    return torch.where(top_p < 1.0, floor.maximum(nucleus), floor)


def by_candidates(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, floor: torch.Tensor
) -> torch.Tensor:
    """The same as `by_search`, faster on the CPU: looks among the likeliest tokens of each row.

    Rows whose answer is not among them are tried again with more, and with all at last. Waits for
    the device.
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


def _search(logits: torch.Tensor, weights: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The largest threshold at which the weights of the tokens not below it reach the target.

    Bisection over the ordered bit patterns of float32: exact, without a sort, and always 32 rounds,
    so that nothing waits for the device. If rounding keeps the sum below the target, nothing is
    dropped: the smallest logit comes back.

    Args:
        logits, weights: float32 [rows, vocab].
        target: [rows, 1].

    Returns:
        float32 [rows, 1].
    """
    low = _order(logits.amin(dim=-1, keepdim=True))
    high = _order(logits.amax(dim=-1, keepdim=True)) + 1
    for _ in range(32):
        middle = (low + high) >> 1
        reached = torch.where(logits >= _unorder(middle), weights, 0.0).sum(-1, keepdim=True)
        enough = reached >= target
        low = torch.where(enough, middle, low)
        high = torch.where(enough, high, middle)
    return _unorder(low)


def _order(values: torch.Tensor) -> torch.Tensor:
    """Integers (int64) in the order of the float32 values."""
    bits = values.view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()


def _unorder(keys: torch.Tensor) -> torch.Tensor:
    """The inverse of `_order`."""
    bits = keys.int()
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float)
