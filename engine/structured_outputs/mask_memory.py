"""Memory that an engine and a grammar's process share: masks are too long for a socket."""

from __future__ import annotations

import math
import mmap
import os

import numpy as np


class MaskMemory:
    """Room for the masks of some rows, in a file of the kernel's that has no name.

    Args:
        file: descriptor of the file, which this object closes; None makes one.
        vocab_size: width of the logits.
    """

    def __init__(self, vocab_size: int, file: int | None = None) -> None:
        self.file = os.memfd_create("masks") if file is None else file
        self._words = math.ceil(vocab_size / 32)
        self._masks = np.empty((0, self._words), dtype=np.int32)

    def __del__(self) -> None:
        os.close(self.file)

    def grow(self, num_rows: int) -> None:
        """Make room for so many rows, if there is less."""
        if num_rows > len(self._masks):
            os.ftruncate(self.file, num_rows * self._words * 4)

    def rows(self, count: int) -> np.ndarray:
        """The masks of the first rows, int32 [count, ceil(vocab / 32)], for which there is room."""
        if count > len(self._masks):
            mapped = mmap.mmap(self.file, 0)
            self._masks = np.frombuffer(mapped, dtype=np.int32).reshape(-1, self._words)
        return self._masks[:count]
