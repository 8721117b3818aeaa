"""Clock, power and reasons for slowing down of a GPU while it works, as nvidia-smi tells them."""

from __future__ import annotations

import statistics
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch

FIELDS = (
    "clocks.sm",
    "power.draw",
    "power.limit",
    "clocks_event_reasons.sw_power_cap",
    "clocks_event_reasons.sw_thermal_slowdown",
    "clocks_event_reasons.hw_slowdown",
)
"""MHz, watts (the mean of a second on recent GPUs) and watts; the others are states."""

Sample = dict[str, str]
"""Field to value; fields that the driver does not know are missing."""

_PERIOD = 0.05
"""Seconds between two samples, besides what a sample takes."""


@contextmanager
def watch_gpu(device: torch.device) -> Iterator[list[Sample]]:
    """Sample the GPU while the block runs; the list is complete when it ends."""
    gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    fields = _known_fields(gpu)
    samples: list[Sample] = []
    done = threading.Event()

    def watch() -> None:
        while fields and not done.wait(_PERIOD):
            samples.extend(filter(None, [_query(gpu, fields)]))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def summarise(samples: Sequence[Sample]) -> dict[str, float]:
    """Of the later half of the samples, medians of numbers, and of states the share of `Active`."""
    later = samples[len(samples) // 2 :]
    columns = {field: [sample[field] for sample in later if field in sample] for field in FIELDS}
    return {field: _summary(values) for field, values in columns.items() if values}


@cache
def _known_fields(gpu: str) -> tuple[str, ...]:
    """The fields that this driver tells of this GPU."""
    return tuple(field for field in FIELDS if _query(gpu, (field,)))


def _summary(values: Sequence[str]) -> float:
    if all(value in ("Active", "Not Active") for value in values):
        return round(statistics.fmean(value == "Active" for value in values), 3)
    return statistics.median(float(value) for value in values)


def _query(gpu: str, fields: Sequence[str]) -> Sample:
    """One sample; empty where there is no nvidia-smi, or it does not know a field."""
    query = f"--query-gpu={','.join(fields)}"
    command = ("nvidia-smi", f"--id={gpu}", query, "--format=csv,noheader,nounits")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.split(",")]
    pairs = zip(fields, values, strict=False)
    return {field: value for field, value in pairs if value and not value.startswith("[")}
