"""Triton reads the choice of its interpreter when it is imported: before that it is made here."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
