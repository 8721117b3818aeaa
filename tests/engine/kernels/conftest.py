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
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
