"""Input tokens of a step, some of which only the device knows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 256


@triton.jit(do_not_specialize=["count"])
def _take_tokens_kernel(known, sources, sampled, out, count, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    source = tl.load(sources + index, mask=inside, other=-1)
    token = tl.load(known + index, mask=inside, other=0)
    last = tl.load(sampled + source, mask=inside & (source >= 0), other=0)
    tl.store(out + index, tl.where(source >= 0, last, token), mask=inside)


def take_tokens(known: torch.Tensor, sources: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor:
    """Tokens that the host knows, and for the others those that their rows sampled last.

    Args:
        known: int64 [tokens].
        sources: row whose last token is wanted, -1 where the host knows the token; int64 [tokens].
        sampled: last token of each row, int64 [rows].

    Returns:
        int64 [tokens].
    """
    out = torch.empty_like(known)
    _take_tokens_kernel[(triton.cdiv(len(known), _BLOCK),)](
        known, sources, sampled, out, len(known), BLOCK=_BLOCK
    )
    return out
