"""The shape of a rank's share of a model. Imports no torch, so that deployments can check it."""

from __future__ import annotations

from dataclasses import replace

from engine.errors import ConfigError
from engine.model_config import ModelConfig


def share_of(shape: ModelConfig, size: int) -> ModelConfig:
    """The shape of what each of `size` ranks has, the vocabulary aside.

    Where there are fewer heads of keys and values than ranks, several ranks have the same one.

    Raises:
        ConfigError: the heads or the inner width cannot be divided so.
    """
    kv_heads = shape.num_kv_heads
    divides = shape.num_heads % size == shape.intermediate_size % size == 0
    if not divides or (kv_heads % size and size % kv_heads):
        raise ConfigError(
            f"tensor_parallel_size is {size}, which does not divide the model's "
            f"{shape.num_heads} heads, {kv_heads} heads of keys and values, and inner width of "
            f"{shape.intermediate_size}; choose another."
        )
    return replace(
        shape,
        num_heads=shape.num_heads // size,
        num_kv_heads=max(1, kv_heads // size),
        intermediate_size=shape.intermediate_size // size,
    )
