"""Which failures an engine outlives, told from exceptions made by hand."""

import weakref

import numpy as np
import pytest
import torch

from engine.failures import Failure, classify, drop_locals

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    MemoryError(),
    np._core._exceptions._ArrayMemoryError((1 << 50,), np.dtype("u1")),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]
DEVICE_LOST = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: unspecified launch failure"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
]
OTHER = [
    ZeroDivisionError("division by zero"),
    RuntimeError("shape mismatch: value tensor of shape [4] cannot be broadcast"),
    ValueError("CUDA error: said by somebody else"),
    AssertionError(),
]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        *((error, Failure.OUT_OF_MEMORY) for error in OUT_OF_MEMORY),
        *((error, Failure.DEVICE_LOST) for error in DEVICE_LOST),
        *((error, Failure.OTHER) for error in OTHER),
    ],
)
def test_kinds(error, kind):
    assert classify(error) is kind


def test_torchs_own_class_of_device_errors_counts_whatever_it_says():
    error_class = getattr(torch, "AcceleratorError", None)
    if error_class is None:
        pytest.skip("this build of torch has no AcceleratorError")
    assert classify(error_class("what?")) is Failure.DEVICE_LOST
    assert classify(error_class("CUDA error: out of memory")) is Failure.OUT_OF_MEMORY


def test_builds_of_torch_without_that_class(monkeypatch):
    monkeypatch.delattr(torch, "AcceleratorError", raising=False)
    assert classify(RuntimeError("CUDA error: misaligned address")) is Failure.DEVICE_LOST
    assert classify(RuntimeError("what?")) is Failure.OTHER


def test_dropping_locals_frees_what_frames_held_but_keeps_the_lines():
    held = []

    def hold(then):
        big = np.zeros(1)
        held.append(weakref.ref(big))
        then()

    def divide():
        try:
            hold(lambda: 1 / 0)
        except ZeroDivisionError:
            hold([].pop)

    try:
        divide()
    except IndexError as error:
        assert all(ref() is not None for ref in held)
        drop_locals(error)
        assert [ref() for ref in held] == [None, None]
        assert error.__traceback__.tb_next.tb_frame.f_code.co_name == "divide"
