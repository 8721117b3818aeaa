"""Masks over the vocabulary, applied to some lines of the logits in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 4096


@triton.jit(do_not_specialize=["num_masks"])
def _mask_kernel(
    logits, packed, num_masks, VOCAB: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr
):
    mask = tl.program_id(0)
    place = tl.load(packed + num_masks * WORDS + mask).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < VOCAB
    word = tl.load(packed + mask * WORDS + token // 32, mask=inside, other=-1)
    is_allowed = (word >> (token % 32)) & 1
    nothing = tl.full((BLOCK,), float("-inf"), tl.float32)
    tl.store(logits + place * VOCAB + token, nothing, mask=inside & (is_allowed == 0))


def apply_token_masks(logits: torch.Tensor, packed: torch.Tensor, num_masks: int) -> None:
    """Set the logits of tokens that are not allowed to -inf, in place.

    Args:
        logits: contiguous float32 [batch, vocab].
        packed: int32, the masks [num_masks, ceil(vocab / 32)] and then their lines [num_masks]; a
            1 bit allows a token.
        num_masks: lines that have a mask.
    """
    vocab_size = logits.shape[1]
    _mask_kernel[(num_masks, triton.cdiv(vocab_size, _BLOCK))](
        logits, packed, num_masks,
        VOCAB=vocab_size, WORDS=triton.cdiv(vocab_size, 32), BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
