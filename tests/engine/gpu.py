"""Marks of tests that need a GPU."""

import pytest
import torch

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
