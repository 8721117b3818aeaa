"""Products of 64 rows, whose programs all run at the same time.

Such a product takes as long as it takes to read the weight. All programs multiply bands of equally
many of the weight's rows, which stream through all of the shared memory, and there are as many
programs as have room. So none is left to read alone at the end ("wave quantization": NVIDIA,
"Matrix Multiplication Background User's Guide"), and no sum is split. Triton's tiles are powers of
two, so a band is one of them or two side by side.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from engine.kernels.launch import num_processors, overlaps_launches, shared_memory

ROWS = 64
"""Rows of x: the smallest tile that Hopper's matrix units multiply. Of a tile that ends before, the
missing rows would be filled with zeros, far slower than they are read."""

_BANDS = ((16, 0), (32, 0), (32, 16), (64, 0), (64, 16), (64, 32), (128, 0), (128, 16))
_WIDE_BANDS = (*_BANDS, (128, 32), (128, 64))
"""Rows of the weight in a program; sums of wider ones do not fit into the registers."""
_MIN_STAGES, _MAX_STAGES = 3, 8
_SHARED_MEMORY = 200 * 1024
"""Bytes of it that a multiprocessor must have for the kernel to gain: those of Hopper do."""
_BARRIERS = 1024
"""Bytes of a program's shared memory that are not for tiles."""


@triton.jit
def _store(
    total, bias, residual, out, column, own, N,
    ROWS: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    if BIAS:
        total += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    here = tl.arange(0, ROWS)[:, None] * N + column[None, :]
    inside = ((column >= own) & (column < N))[None, :]
    if RESIDUAL:
        total += tl.load(residual + here, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + here, total, mask=inside)


@triton.jit
def _gate(gate, up, dtype: tl.constexpr):
    """silu(gate) · up of what separate products would have stored."""
    gate = gate.to(dtype).to(tl.float32)
    return gate * tl.sigmoid(gate) * up.to(dtype).to(tl.float32)


@triton.jit
def _wave_kernel(
    x, weight, rest_weight, bias, residual, out, N, K: tl.constexpr,
    ROWS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, DEPTH: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0) * (MAIN + REST)
    first = tl.maximum(tl.minimum(own, N - MAIN - REST), 0)  # not to read behind the weight
    if OVERLAP:
        if not GATED:
            gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros((ROWS, MAIN), tl.float32)
    up = tl.zeros((ROWS, MAIN), tl.float32)
    if REST > 0:
        rest = tl.zeros((ROWS, REST), tl.float32)
        rest_up = tl.zeros((ROWS, REST), tl.float32)
    for k in range(0, K, DEPTH):
        inputs = x.load([0, k])
        total = tl.dot(inputs, tl.trans(weight.load([first, k])), total)
        if REST > 0:
            rest = tl.dot(inputs, tl.trans(rest_weight.load([first + MAIN, k])), rest)
        if GATED:
            up = tl.dot(inputs, tl.trans(weight.load([N + first, k])), up)
            if REST > 0:
                rest_up = tl.dot(inputs, tl.trans(rest_weight.load([N + first + MAIN, k])), rest_up)
    if GATED:
        if OVERLAP:
            gdc_launch_dependents()  # the product that follows wants shared memory of its own
        total = _gate(total, up, out.dtype.element_ty)
    column = first + tl.arange(0, MAIN)
    _store(total, bias, residual, out, column, own, N, ROWS, BIAS, RESIDUAL)
    if REST > 0:
        if GATED:
            rest = _gate(rest, rest_up, out.dtype.element_ty)
        column = first + MAIN + tl.arange(0, REST)
        _store(rest, bias, residual, out, column, own, N, ROWS, BIAS, RESIDUAL)


def gains(weight: torch.Tensor) -> bool:
    """Whether the kernel is for this weight, and its device has the units that make it fast.

    Of weights with few outputs the sums are long, and better split.
    """
    (outputs, inputs), device = weight.shape, weight.device
    readable = inputs * weight.element_size() % 16 == 0
    able = overlaps_launches(device) and shared_memory(device) >= _SHARED_MEMORY
    return able and readable and inputs <= 2 * outputs


def wave_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x Wᵀ + b + residual, summed in float32.

    Args:
        x: contiguous bfloat16 or float16 [`ROWS`, in].
        weight: contiguous [out, in]; its rows are multiples of 16 bytes.
        bias: [out].
        residual: contiguous [`ROWS`, out].
        out: takes the result, contiguous [`ROWS`, out] of x's type; the residual may lie there.

    Returns:
        [`ROWS`, out], of x's type.
    """
    out = x.new_empty(len(x), len(weight)) if out is None else out
    return _launch(x, weight, bias, residual, out, gated=False)


def gated_wave_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """silu(x Gᵀ) · x Uᵀ of the gates G and the ups U, computed in float32.

    Args:
        x: contiguous bfloat16 or float16 [`ROWS`, in].
        weight: contiguous [2 × out, in], the gates before the ups; rows as above.

    Returns:
        [`ROWS`, out], of x's type.
    """
    out = x.new_empty(len(x), len(weight) // 2)
    return _launch(x, weight, None, None, out, gated=True)


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    *,
    gated: bool,
) -> torch.Tensor:
    n, k, overlap = out.shape[1], x.shape[1], overlaps_launches(x.device)
    main, rest, depth, stages, _ = _plan(n, gated, x.device)
    _wave_kernel[(triton.cdiv(n, main + rest),)](
        _tiles(x, ROWS, depth), _tiles(weight, main, depth),
        _tiles(weight, rest or main, depth),
        bias, residual, out, n, K=k, ROWS=ROWS, MAIN=main, REST=rest, DEPTH=depth,
        GATED=gated, BIAS=bias is not None, RESIDUAL=residual is not None, OVERLAP=overlap,
        launch_pdl=overlap, num_warps=4, num_stages=stages,
    )  # fmt: skip
    return out


def _tiles(matrix: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


class _Plan(NamedTuple):
    """How a product is divided."""

    main: int
    """Rows of a band."""
    rest: int
    """More of them, beside those."""
    depth: int
    """Columns of the weight in a step of the loop."""
    stages: int
    """Steps in flight."""
    programs: int
    """That a multiprocessor runs at a time."""


@cache
def _plan(n: int, gated: bool, device: torch.device) -> _Plan:
    """Of the plans with enough steps in flight, the one that leaves least room for programs empty.

    Where gates are computed, a multiprocessor may run several: while one gates and stores, the
    others read on.
    """
    plans = [_plan_for(n, programs, gated, device) for programs in ((1, 2, 3) if gated else (1,))]
    flowing = [plan for plan in plans if plan.stages >= _MIN_STAGES] or plans[:1]
    return max(flowing, key=lambda plan: (_share(n, plan, device), plan.programs))


def _plan_for(n: int, programs: int, gated: bool, device: torch.device) -> _Plan:
    """With the narrowest bands that run at once; of large weights, many wide ones run in turn."""
    bands, room = _BANDS if gated else _WIDE_BANDS, programs * num_processors(device)
    band = next((band for band in bands if triton.cdiv(n, sum(band)) <= room), bands[-1])
    memory, depth, stages = shared_memory(device) // programs - _BARRIERS, 256, 0
    while stages < _MIN_STAGES and depth > 64:
        depth //= 2
        stages = memory // (2 * depth * (ROWS + sum(band) * (1 + gated)))
    return _Plan(*band, depth, max(1, min(stages, _MAX_STAGES)), programs)


def _share(n: int, plan: _Plan, device: torch.device) -> float:
    """Of the room for programs, how much is taken on average while there are any."""
    width, room = plan.main + plan.rest, plan.programs * num_processors(device)
    return float(n / width / (triton.cdiv(n, width * room) * room))
