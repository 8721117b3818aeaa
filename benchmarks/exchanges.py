"""The part of a decode step that ranks spend in exchanges, by the first rank's kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

_EXCHANGES = ("AllReduce", "all_reduce")
"""Parts of the names of kernels that sum over the ranks: NCCL's, and torch's."""


def exchange_share(generate: Callable[[], None], layers: int, steps: int) -> float | None:
    """Run `generate` and look at its last decode steps.

    A kernel that waits for the other ranks counts whole: the share holds what ranks wait for each
    other. Every layer exchanges twice.

    Args:
        generate: runs at least `steps` decode steps, and nothing but those at its end.
        layers: of the model.
        steps: how many to look at.

    Returns:
        From 0 to 1; None if there were fewer exchanges, or no GPU.
    """
    if not torch.cuda.is_available():
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        generate()
    spans: list[tuple[float, float]] = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if any(name in event.name for name in _EXCHANGES)
    )[-2 * layers * steps :]
    if len(spans) < 2 * layers * steps:
        return None
    return sum(end - start for start, end in spans) / (spans[-1][1] - spans[0][0])
