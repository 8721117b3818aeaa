"""Root-mean-square normalisation in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels.launch import overlaps_launches


@triton.jit
def _rms_norm_kernel(
    x, weight, out, eps, size: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    value = tl.load(x + row * size + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value) / size + eps)
    tl.store(out + row * size + column, value * scale * factor, mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) · weight, computed in float32.

    Args:
        x: contiguous [rows, size].
        weight: [size].
        eps: keeps the root away from 0.

    Returns:
        [rows, size], of x's type.
    """
    out = torch.empty_like(x)
    block = triton.next_power_of_2(x.shape[1])
    overlap = overlaps_launches(x.device)
    warps = 8 if block > 2048 else 4
    _rms_norm_kernel[(len(x),)](
        x, weight, out, eps, size=x.shape[1], BLOCK=block, OVERLAP=overlap,
        num_warps=warps, launch_pdl=overlap,
    )  # fmt: skip
    return out
