"""The gated feed-forward block (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from engine.layers.linear import Linear, SummedLinear
from engine.model_config import ModelConfig
from engine.parallel.group import ALONE, TensorGroup


class GatedMLP(nn.Module):
    """down(silu(gate(x)) · up(x)), gate and up merged."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        group: TensorGroup = ALONE,
    ) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up = Linear(hidden, (inner, inner), bias=False, dtype=dtype, device=device)
        self.down = SummedLinear(group, inner, hidden, bias=False, dtype=dtype, device=device)
        self._activate = _silu_mul
        if device.type == "cuda":
            from engine.kernels.activation import silu_mul
            from engine.kernels.wave_linear import gated_wave_linear

            self._activate, self._gated_wave = silu_mul, gated_wave_linear

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] → residual plus the block's output, [tokens, hidden].

        `residual` may be overwritten.
        """
        return self.down.forward_add(self._gated(x), residual)

    def _gated(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) == self.gate_up.wave_rows:
            return self._gated_wave(x, self.gate_up.weight)
        return self._activate(self.gate_up(x))

    def warm_ups(self) -> Iterator[Callable[[], torch.Tensor]]:
        """Calls that compile the kernels of products; they may run in threads of their own."""
        for x in self.gate_up.few_rows():
            yield partial(self._gated, x)
        yield from self.down.warm_ups(adds=True)

    def slots(self) -> dict[str, torch.Tensor]:
        """Parameters by checkpoint name."""
        return self.gate_up.slots("gate_proj", "up_proj") | self.down.slots("down_proj")


def _silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)
