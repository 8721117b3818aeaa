"""Linear projections; on CPU with weights packed for oneDNN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from engine.parallel.group import TensorGroup

_PACK_ROWS = 32
"""Rows that oneDNN is told to expect when it chooses the packed layout, which then does well from
1 row to 1024."""
_FAST_ROWS = 4
"""Packed products of fewer rows take longer: oneDNN then runs a matrix-vector kernel."""


class Linear(nn.Module):
    """y = x Wᵀ + b, several projections of one input merged into a single weight.

    Args:
        in_features: width of x.
        out_features: widths of the merged outputs, which come side by side.
        bias: whether there is a b.
        dtype: of weight and bias.
        device: of weight and bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: tuple[int, ...],
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        total = sum(out_features)
        self.out_features = out_features
        self.weight = torch.empty(total, in_features, dtype=dtype, device=device)
        self.bias = torch.empty(total, dtype=dtype, device=device) if bias else None
        self._packed = False
        self._has_kernels = device.type == "cuda" and dtype != torch.float32
        self._skinny_rows = 0
        """Most rows for which the kernel for the fewest rows is used."""
        self.wave_rows: int | None = None
        """Rows for which the kernel for exactly so many is used."""

    def slots(self, *names: str) -> dict[str, torch.Tensor]:
        """Views of the merged parameters by checkpoint name, one name for each output."""
        slots = dict(zip(names, self.weight.split(self.out_features), strict=True))
        found = {f"{name}.weight": view for name, view in slots.items()}
        if self.bias is not None:
            biases = zip(names, self.bias.split(self.out_features), strict=True)
            found |= {f"{name}.bias": view for name, view in biases}
        return found

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        """x with rows of zeros below, if the product is faster with more rows."""
        missing = _FAST_ROWS - len(x) if self._packed else 0
        return functional.pad(x, (0, 0, 0, missing)) if missing > 0 else x

    def warm_ups(self, *, adds: bool) -> Iterator[Callable[[], torch.Tensor]]:
        """Calls that compile the kernels for few rows; they may run in threads of their own.

        Args:
            adds: warm `forward_add` up instead of `forward`.
        """
        for x in self.few_rows():
            if adds:
                yield partial(Linear.forward_add, self, x, x.new_zeros(len(x), len(self.weight)))
            else:
                yield partial(self.forward, x)

    def few_rows(self) -> Iterator[torch.Tensor]:
        """An input for each of the kernels for few rows, [rows, in_features]."""
        for rows in (16, 32, 64):
            if rows <= self._skinny_rows or rows == self.wave_rows:
                yield self.weight.new_zeros(rows, self.weight.shape[1])

    def finalize(self) -> None:
        """Choose kernels for the weight, and pack it where the device gains by it: it can then no
        longer be read."""
        if self._has_kernels:
            self._choose_kernels()
        if (packed := _pack(self.weight)) is not None:
            self.weight, self._packed = packed, True

    def _choose_kernels(self) -> None:
        from engine.kernels import linear, wave_linear

        self._skinny, self._wave = linear.skinny_linear, wave_linear.wave_linear
        self._skinny_rows = linear.gainful_rows(len(self.weight))
        if wave_linear.gains(self.weight):
            self.wave_rows = wave_linear.ROWS

    def _kernel(self, rows: int) -> Callable[..., torch.Tensor] | None:
        """The kernel for so many rows; None where the library's product is used."""
        if rows == self.wave_rows:
            return self._wave
        return self._skinny if rows <= self._skinny_rows else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, in_features] → [tokens, sum of out_features]."""
        if self._packed:
            product: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(
                x, self.weight, self.bias, "none", [], ""
            )
            return product
        if (kernel := self._kernel(len(x))) is not None:
            return kernel(x, self.weight, self.bias)
        return functional.linear(x, self.weight, self.bias)

    def forward_add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The projection of x plus `residual`, in one pass where the device can.

        `residual` may be overwritten.
        """
        if self._packed:
            total: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(
                x, residual, self.weight, self.bias, "add"
            )
            return total
        if (kernel := self._kernel(len(x))) is not None:
            return kernel(x, self.weight, self.bias, residual)
        if self.bias is None:
            return residual.addmm_(x, self.weight.t())
        return functional.linear(x, self.weight, self.bias).add_(residual)


class SummedLinear(Linear):
    """A projection of which each rank has some columns: the products of all are summed.

    Args:
        group: of the ranks.
        others: as for `Linear`; `in_features` are those of this rank.
    """

    def __init__(
        self, group: TensorGroup, in_features: int, out_features: int, **others: Any
    ) -> None:
        super().__init__(in_features, (out_features,), **others)
        self._group = group

    def finalize(self) -> None:
        """As for `Linear`; the bias is the first rank's to add."""
        if self.bias is not None and self._group.rank > 0:
            self.bias.zero_()
        super().finalize()

    @property
    def _adds(self) -> bool:
        """Whether the residual, which all ranks have, is this one's to add."""
        return self._group.rank == 0

    def warm_ups(self, *, adds: bool) -> Iterator[Callable[[], torch.Tensor]]:
        """As for `Linear`, of this rank's products alone: exchanges have an order, which threads do
        not keep."""
        return super().warm_ups(adds=adds and self._adds)

    def forward_add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """As for `Linear`, summed over the ranks."""
        if (out := self._group.summand(len(x))) is not None:
            return self._group.sum(self._compute_into(out, x, residual if self._adds else None))
        return self._group.sum(super().forward_add(x, residual) if self._adds else self.forward(x))

    def _compute_into(
        self, out: torch.Tensor, x: torch.Tensor, residual: torch.Tensor | None
    ) -> torch.Tensor:
        """`forward` or `forward_add` into `out`, where the residual may lie."""
        if (kernel := self._kernel(len(x))) is not None:
            return kernel(x, self.weight, self.bias, residual, out)
        if residual is None:
            torch.mm(x, self.weight.t(), out=out)
        else:
            torch.addmm(residual, x, self.weight.t(), out=out)
        return out if self.bias is None else out.add_(self.bias)


def _pack(weight: torch.Tensor) -> torch.Tensor | None:
    """The weight in oneDNN's blocked layout; None where that cannot be had.

    MKL, which torch takes for a plain float32 product, is several times slower at the few rows of a
    decode step on CPUs that are not Intel's. The operators are those that torch's compiler emits
    for linear layers; they are not part of its public API.
    """
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    try:
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS)
    except (AttributeError, RuntimeError):  # no such operator, or a type that this CPU lacks
        return None
    return packed
