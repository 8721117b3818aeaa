"""Random weights, for tests and for benchmarks of shapes."""

from __future__ import annotations

import torch

from engine.parallel.partition import Partition

_DEVIATION = 0.02
"""Standard deviation, the usual one of transformers' initialisers."""


def fill_dummy(
    slots: dict[str, torch.Tensor],
    whole: dict[str, torch.Tensor],
    partition: Partition,
    seed: int,
) -> None:
    """Draw every parameter from a normal distribution; normalisations keep their weight of 1.

    Args:
        slots: parameters by name.
        whole: of the whole model; only their shapes count.
        partition: which part of them `slots` are.
        seed: of the draws, which do not depend on the partition.
    """
    for index, (name, slot) in enumerate(slots.items()):
        if name.endswith("norm.weight"):
            continue
        generator = torch.Generator(slot.device).manual_seed(seed * 100_003 + index)
        part = partition.part(name, tuple(whole[name].shape))
        drawn = slot if not part else torch.empty_like(whole[name], device=slot.device)
        drawn.normal_(0.0, _DEVIATION, generator=generator)
        if part:
            slot.copy_(drawn[part])
