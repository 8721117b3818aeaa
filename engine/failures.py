"""Tells failures apart: which ones an engine outlives, and which are for want of memory."""

from __future__ import annotations

import enum
import traceback

import torch

from engine.errors import RankLost


class Failure(enum.Enum):
    """What an exception of the runner means."""

    OUT_OF_MEMORY = enum.auto()
    """An allocation failed; smaller ones may succeed."""
    DEVICE_LOST = enum.auto()
    """The device's context is broken, or another rank is lost: every later call fails, until the
    process is replaced."""
    OTHER = enum.auto()


_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
_DEVICE_LOST = ("CUDA error", "Triton Error [CUDA]", "device-side assert")


def classify(error: BaseException) -> Failure:
    """Tell what kind of failure an exception of torch, Triton, NumPy or Python is.

    Not every CUDA error breaks the context for good, but which does cannot be told by the texts of
    all libraries: any that is not about memory counts as lost.
    """
    if isinstance(error, RankLost):
        return Failure.DEVICE_LOST
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return Failure.OUT_OF_MEMORY
    if not isinstance(error, RuntimeError):
        return Failure.OTHER
    text = str(error)
    if any(phrase in text for phrase in _OUT_OF_MEMORY):
        return Failure.OUT_OF_MEMORY
    accelerator_error = getattr(torch, "AcceleratorError", ())  # not every build has it
    if isinstance(error, accelerator_error) or any(phrase in text for phrase in _DEVICE_LOST):
        return Failure.DEVICE_LOST
    return Failure.OTHER


def drop_locals(error: BaseException | None) -> None:
    """Let go of what the frames of an exception hold, tensors above all; the lines stay."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
