"""Random weights, for tests and for benchmarks of shapes."""

from __future__ import annotations

import torch

_DEVIATION = 0.02
"""Standard deviation, the usual one of transformers' initialisers."""


def fill_dummy(slots: dict[str, torch.Tensor], seed: int) -> None:
    """Draw every parameter from a normal distribution; normalisations keep their weight of 1."""
    for index, (name, slot) in enumerate(slots.items()):
        if name.endswith("norm.weight"):
            continue
        generator = torch.Generator(slot.device).manual_seed(seed * 100_003 + index)
        slot.normal_(0.0, _DEVIATION, generator=generator)
