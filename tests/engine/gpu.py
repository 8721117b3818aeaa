"""Marks of tests that need a GPU."""

import pytest
import torch

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
DOT_DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=needs_gpu)]
"""Types for kernels that use `tl.dot`, which Triton's interpreter computes wrongly in bfloat16."""
