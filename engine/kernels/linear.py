"""Products of few rows with a weight matrix, bound by the time it takes to read the weight.

Each program multiplies a band of the weight's rows, and where there are too few bands for the GPU,
splits of the sum share one: whichever ends last adds them up, always in the same order ("stream-K"
without atomics on the sums; Osama et al. 2023, arXiv:2301.03598).
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels.launch import num_processors, overlaps_launches, shared_memory

MAX_ROWS = 64
"""Most rows of x."""

_BAND = 64
"""Rows of the weight in a program."""
_SPLIT_BELOW = 0.45
"""Programs a multiprocessor below which bands are split."""


@triton.jit(do_not_specialize=["M"])
def _skinny_kernel(
    x, weight, bias, residual, out, partials, arrivals,
    M, N, K: tl.constexpr, STEPS: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, BAND: tl.constexpr, DEPTH: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    band, split = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, ROWS)
    column = band * BAND + tl.arange(0, BAND)
    depth = tl.arange(0, DEPTH)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros((BAND, ROWS), tl.float32)
    for step in range(split * STEPS, split * STEPS + STEPS):
        k = step * DEPTH + depth
        weights = tl.load(
            weight + column[:, None].to(tl.int64) * K + k[None, :],
            mask=(column[:, None] < N) & (k[None, :] < K), other=0.0,
        )  # fmt: skip
        inputs = tl.load(
            x + row[None, :] * K + k[:, None],
            mask=(row[None, :] < M) & (k[:, None] < K), other=0.0,
        )  # fmt: skip
        total = tl.dot(weights, inputs, total)
    if SPLITS > 1:
        tile = tl.arange(0, BAND)[:, None] * ROWS + row[None, :]
        place = partials + (band * SPLITS + split) * BAND * ROWS
        tl.store(place + tile, total)
        tl.debug_barrier()
        if tl.atomic_add(arrivals + band, 1, sem="acq_rel") < SPLITS - 1:
            return
        tl.store(arrivals + band, 0)
        total = tl.zeros((BAND, ROWS), tl.float32)
        for other in range(SPLITS):
            place = partials + (band * SPLITS + other) * BAND * ROWS
            total += tl.load(place + tile, cache_modifier=".cg")
    if BIAS:
        total += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[:, None]
    inside = (column[:, None] < N) & (row[None, :] < M)
    here = row[None, :] * N + column[:, None]
    if RESIDUAL:
        total += tl.load(residual + here, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + here, total, mask=inside)


def skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x Wᵀ + b + residual, summed in float32.

    Calls may not overlap on one device: they share scratch memory.

    Args:
        x: contiguous bfloat16 or float16 [rows, in], at most `MAX_ROWS` rows.
        weight: contiguous [out, in].
        bias: [out].
        residual: contiguous [rows, out].
        out: takes the result, contiguous [rows, out] of x's type; the residual may lie there.

    Returns:
        [rows, out], of x's type.
    """
    (m, k), n = x.shape, len(weight)
    overlap = overlaps_launches(x.device)
    out = x.new_empty(m, n) if out is None else out
    rows = max(16, triton.next_power_of_2(m))
    bands = triton.cdiv(n, _BAND)
    depth, stages, splits = _plan(bands, k, rows, x.device)
    partials, arrivals = _scratch(x.device)
    _skinny_kernel[(bands, splits)](
        x, weight, bias, residual, out, partials, arrivals, m, n, K=k,
        STEPS=triton.cdiv(k, depth * splits), SPLITS=splits, ROWS=rows, BAND=_BAND, DEPTH=depth,
        BIAS=bias is not None, RESIDUAL=residual is not None, OVERLAP=overlap, launch_pdl=overlap,
        num_warps=4, num_stages=stages,
    )  # fmt: skip
    return out


def gainful_rows(out_features: int) -> int:
    """Rows up to which the kernel is used; above, cuBLAS is as fast or faster on an H200.

    cuBLAS, too, splits the sums where outputs are few, and adds them up in a launch of its own.
    """
    return MAX_ROWS if out_features <= 64 * _BAND else MAX_ROWS // 2


@cache
def _plan(bands: int, k: int, rows: int, device: torch.device) -> tuple[int, int, int]:
    """Columns of the weight in a step of the loop, steps in flight, and splits.

    Where bands are few, each must have much in flight, as far as shared memory goes.
    """
    processors, splits = num_processors(device), 1
    depth, stages = 128, 5 if rows == MAX_ROWS else 4
    if rows == 16 and bands <= processors:
        depth, stages = 256, 3
    while bands * splits < _SPLIT_BELOW * processors and splits < 8 and k > 2 * splits * depth:
        splits *= 2
    stages = min(stages, shared_memory(device) // (2 * depth * (_BAND + rows)))
    return depth, stages, splits


@cache
def _scratch(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial sums and arrivals of the bands that share: there are fewer than processors."""
    bands = num_processors(device)
    partials = torch.empty(bands * 8 * _BAND * MAX_ROWS, dtype=torch.float32, device=device)
    return partials, torch.zeros(bands, dtype=torch.int32, device=device)
