"""The gate of the feed-forward block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels.launch import overlaps_launches

_BLOCK = 1024


@triton.jit
def _silu_mul_kernel(gate_up, out, size: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    gate = tl.load(gate_up + row * 2 * size + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * size + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, gate * tl.sigmoid(gate) * up, mask=inside)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up, computed in float32.

    Args:
        gate_up: contiguous [tokens, 2 × size], the gates before the ups.

    Returns:
        [tokens, size], of the same type.
    """
    tokens, size = len(gate_up), gate_up.shape[1] // 2
    overlap = overlaps_launches(gate_up.device)
    out = gate_up.new_empty(tokens, size)
    _silu_mul_kernel[(tokens, triton.cdiv(size, _BLOCK))](
        gate_up, out, size=size, BLOCK=_BLOCK, OVERLAP=overlap, launch_pdl=overlap
    )
    return out
