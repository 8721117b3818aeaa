"""Linear projections; on CPU with weights packed for oneDNN."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

_PACK_ROWS = 32
"""Rows that oneDNN is told to expect when it chooses the packed layout."""


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

    def slots(self, *names: str) -> dict[str, torch.Tensor]:
        """Views of the merged parameters by checkpoint name, one name for each output."""
        slots = dict(zip(names, self.weight.split(self.out_features), strict=True))
        found = {f"{name}.weight": view for name, view in slots.items()}
        if self.bias is not None:
            biases = zip(names, self.bias.split(self.out_features), strict=True)
            found |= {f"{name}.bias": view for name, view in biases}
        return found

    def pack(self) -> None:
        """Put a CPU weight into oneDNN's blocked layout; it can be multiplied, no longer read.

        MKL, which torch takes for a plain float32 product, is 2 to 5 times slower at the few rows
        of a decode step on CPUs that are not Intel's.
        """
        if self.weight.device.type == "cpu" and _can_pack():
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, _PACK_ROWS)
            self._packed = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, in_features] → [tokens, sum of out_features]."""
        if self._packed:
            product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self.weight, self.bias, "none", [], ""
            )
            return product
        return functional.linear(x, self.weight, self.bias)

    def forward_add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The projection of x plus `residual`, in one pass where the device can."""
        if self._packed:
            total: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(
                x, residual, self.weight, self.bias, "add"
            )
            return total
        return functional.linear(x, self.weight, self.bias).add_(residual)


def _can_pack() -> bool:
    """Whether this build of torch has the operators; they are not part of its public API."""
    return torch.backends.mkldnn.is_available() and hasattr(
        torch.ops.mkldnn, "_reorder_linear_weight"
    )
