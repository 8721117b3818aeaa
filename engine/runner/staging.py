"""Brings the arrays of a step to the device in one copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_ALIGNMENT = 16
"""Bytes; each array begins at a multiple, so that kernels may load it in wide words."""
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

    def upload(self, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Tensors of the same types and shapes on the device.

        Waits only for a device that has not even copied the last step but two.
        """
        if self._device.type != "cuda":
            return [torch.from_numpy(array) for array in arrays]
        host, buffer = self._host[self._next], self._arrays[self._next]
        copied = self._copied[self._next]
        copied.synchronize()
        self._next = (self._next + 1) % _RING
        end, tensors = 0, []
        for array in arrays:
            begin, end = end, end + array.nbytes
            buffer[begin:end].view(array.dtype)[:] = array.reshape(-1)
            dtype = _TORCH_TYPES[array.dtype]
            tensors.append(self._twin[begin:end].view(dtype).view(array.shape))
            end = -(-end // _ALIGNMENT) * _ALIGNMENT
        self._twin[:end].copy_(host[:end], non_blocking=True)
        copied.record()
        return tensors


_TORCH_TYPES = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
}
