"""Brings the arrays of a step to the device in one copy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

_ALIGNMENT = 16
"""Bytes; each array begins at a multiple, so that kernels may load it in wide words."""
_PLACES = 1 << 12
"""The places of so many arrays are remembered: all graphs have about 3,000, in three buffers."""
_Key = tuple[int, int, np.dtype, tuple[int, ...]]
"""Host buffer, begin, type and shape of an array."""
_Place = tuple[np.ndarray, torch.Tensor, int]
"""An array's place in the buffer and on the device, and where the next one begins."""
_RING = 3
"""Host buffers: with one step in flight and one to be launched, none is waited for."""


class Staging:
    """Pinned host memory and its twin on the device; on CPU arrays are used where they are.

    Arrays of the same shapes come to lie at the same addresses in every step, as CUDA graphs need
    it. The device's copy is overwritten by the next upload: in the order of one stream, that is
    after the kernels that read it.

    Args:
        capacity: bytes of the largest upload.
        device: where the arrays go.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._device = device
        self._next = 0
        if device.type == "cuda":
            self._host = [
                torch.empty(capacity, dtype=torch.uint8, pin_memory=True) for _ in range(_RING)
            ]
            self._arrays = [host.numpy() for host in self._host]
            self._copied = [torch.cuda.Event() for _ in range(_RING)]
            self._twin = torch.empty(capacity, dtype=torch.uint8, device=device)
            self._places: dict[_Key, _Place] = {}

    def upload(self, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Tensors of the same types and shapes on the device.

        Waits only for a device that has not even copied the last step but two.
        """
        if self._device.type != "cuda":
            return [torch.from_numpy(array) for array in arrays]
        buffer, self._next = self._next, (self._next + 1) % _RING
        self._copied[buffer].synchronize()
        end, tensors = 0, []
        for array in arrays:
            place, tensor, end = self._place((buffer, end, array.dtype, array.shape))
            place[...] = array
            tensors.append(tensor)
        self._twin[:end].copy_(self._host[buffer][:end], non_blocking=True)
        self._copied[buffer].record()
        return tensors

    def _place(self, key: _Key) -> _Place:
        if (known := self._places.get(key)) is not None:
            return known
        buffer, begin, dtype, shape = key
        end = begin + math.prod(shape) * dtype.itemsize
        place = self._arrays[buffer][begin:end].view(dtype).reshape(shape)
        tensor = self._twin[begin:end].view(_TORCH_TYPES[dtype]).view(shape)
        if len(self._places) == _PLACES:
            self._places.clear()  # steps without a graph have ever new shapes
        self._places[key] = place, tensor, -(-end // _ALIGNMENT) * _ALIGNMENT
        return self._places[key]


_TORCH_TYPES = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
}
