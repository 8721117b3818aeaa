"""Kernels run on the GPU if there is one, else in Triton's interpreter.

Triton reads the choice when it is imported, so it is made here, before any test module is.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device():
    """With its index, as tensors have it: what kernels keep by device is found so."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
