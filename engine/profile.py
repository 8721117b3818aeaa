"""What the steps of an engine cost: host seconds by phase, and seconds of the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class StepRecord:
    """One step. Host phases of a step overlap the device's work on the step before it."""

    rows: int
    tokens: int
    """Tokens computed."""
    context_tokens: int
    """Keys attended, over all rows."""
    decode: bool
    """Every row computes one token."""
    schedule_s: float
    prepare_s: float
    """Laying out the input tensors and sending them to the device."""
    launch_s: float
    """Launching kernels; on CPU, running them."""
    wait_s: float
    """Waiting for the sampled tokens."""
    update_s: float
    """Taking them in."""
    device_s: float | None = None
    """From the first kernel of the forward pass to the last of the sampler; None on CPU."""
    idle_s: float | None = None
    """From the end of the step before to this first kernel; None on CPU and for the first step."""


def add_device_times(
    records: Sequence[StepRecord],
    timers: Sequence[tuple[torch.cuda.Event, torch.cuda.Event] | None],
) -> None:
    """Fill in what the device took, from (first kernel, last kernel) of each step, all done."""
    before: torch.cuda.Event | None = None
    for record, pair in zip(records, timers, strict=True):
        if pair is None:
            continue
        first, last = pair
        record.device_s = first.elapsed_time(last) / 1e3
        if before is not None:
            record.idle_s = max(0.0, before.elapsed_time(first) / 1e3)
        before = last


class IdleTime:
    """Adds up the time in which the device had nothing to do: no step was launched whose result had
    not been taken.

    By the host's clock, which costs no wait for the device. Pauses between the kernels of steps
    that were launched one ahead of another are not seen; a profile has them, `StepRecord.idle_s`.

    Args:
        clock: seconds, never going back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ended_s = 0.0
        self._since: float | None = clock()

    @property
    def seconds(self) -> float:
        """So far."""
        return self._ended_s + (0.0 if self._since is None else self._clock() - self._since)

    def begin(self) -> None:
        """The device has nothing to do from now on."""
        if self._since is None:
            self._since = self._clock()

    def end(self) -> None:
        """The device has something to do from now on."""
        self._ended_s, self._since = self.seconds, None
