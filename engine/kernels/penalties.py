"""Repetition, presence and frequency penalties, each step in one launch to apply and one to count.

Formulas and the table of seen tokens are those of `engine.sampling.penalties`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 4096


@triton.jit
def _load_row(rows, repetitions, presences, frequencies, stride, place):
    """A line's row, whether it has any penalty, and the three."""
    row = tl.load(rows + place)
    repetition = tl.load(repetitions + row * stride)
    presence = tl.load(presences + row * stride)
    frequency = tl.load(frequencies + row * stride)
    is_penalised = (repetition != 1) | (presence != 0) | (frequency != 0)
    return row, is_penalised, repetition, presence, frequency


@triton.jit(do_not_specialize_on_alignment=["rows"])
def _apply_kernel(
    logits, rows, seen, repetitions, presences, frequencies, stride,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    row, is_penalised, repetition, presence, frequency = _load_row(
        rows, repetitions, presences, frequencies, stride, place
    )
    if is_penalised:
        token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = token < VOCAB
        logit = tl.load(logits + place * VOCAB + token, mask=inside, other=0.0)
        mark = tl.load(seen + row * VOCAB + token, mask=inside, other=0)
        factor = tl.where(mark != 0, repetition, 1.0)
        logit = tl.where(logit > 0, tl.div_rn(logit, factor), logit * factor)
        count = mark >> 1
        logit -= frequency * count.to(tl.float32)
        logit -= tl.where(count > 0, presence, 0.0)
        tl.store(logits + place * VOCAB + token, logit, mask=inside)


@triton.jit(do_not_specialize_on_alignment=["rows"])
def _count_kernel(
    token_ids, rows, seen, repetitions, presences, frequencies, stride, VOCAB: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64)
    row, is_penalised, _, _, _ = _load_row(rows, repetitions, presences, frequencies, stride, place)
    if is_penalised:
        cell = seen + row * VOCAB + tl.load(token_ids + place)
        tl.store(cell, tl.load(cell) + 2)


def apply_penalties(
    logits: torch.Tensor,
    rows: torch.Tensor,
    seen: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> None:
    """Penalise logits in place.

    Args:
        logits: contiguous float32 [batch, vocab].
        rows: the row of each line, int64 [batch].
        seen: tokens of each row, contiguous int32 [rows, vocab]; rows without a penalty may lie
            beyond it.
        repetition: of each row, float32 [rows, 1]; 1 is none.
        presence: the same, as far apart; 0 is none.
        frequency: the same, as far apart; 0 is none.
    """
    batch, vocab_size = logits.shape
    # Without fused multiply-add the result is rounded as on the CPU.
    _apply_kernel[(batch, triton.cdiv(vocab_size, _BLOCK))](
        logits, rows, seen, repetition, presence, frequency, repetition.stride(0),
        VOCAB=vocab_size, BLOCK=_BLOCK, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip


def count_tokens(
    token_ids: torch.Tensor,
    rows: torch.Tensor,
    seen: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> None:
    """Count the tokens [batch] that penalised rows have sampled; the rest as `apply_penalties`."""
    _count_kernel[(len(token_ids),)](
        token_ids, rows, seen, repetition, presence, frequency, repetition.stride(0),
        VOCAB=seen.shape[1], num_warps=1,
    )  # fmt: skip
