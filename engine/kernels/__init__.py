"""Triton kernels for CUDA; each module offers a function of tensors and hides its launch."""
