"""How kernels are launched.

All engines of a process launch them on the device's default stream: some keep scratch memory by
device, which a launch leaves as the next one wants it. Memory by stream would not do, as the graphs
of all engines are captured on one stream and replayed on another.
"""

from __future__ import annotations

from functools import cache

import torch
import triton


@cache
def overlaps_launches(device: torch.device) -> bool:
    """Whether a kernel may be set up while the one before it still runs.

    Programmatic dependent launch (CUDA C++ Programming Guide, section of that name) is there from
    Hopper on. Several kernels launched so may run at a time, so each calls `gdc_wait` before it
    ends, and before it touches what any of them writes. Sooner it may read only what they leave
    alone: what copies, and kernels launched in the ordinary way, wrote before the first of them,
    such as the layout of the step.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have; some in Triton's interpreter."""
    if device.type != "cuda":
        return 1 << 16
    index = torch.cuda.current_device() if device.index is None else device.index
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    return int(properties["max_shared_mem"])


@cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of the device; a few in Triton's interpreter."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
