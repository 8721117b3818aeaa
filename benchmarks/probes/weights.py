"""The weights of a transformer's layer."""

from __future__ import annotations

from benchmarks.roofline import Shape


def weight_sizes(shape: Shape) -> list[tuple[str, tuple[int, int]]]:
    """The merged weights of one layer, each by name with its outputs and inputs."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return [
        ("qkv", (queries + 2 * keys, shape.hidden)),
        ("o", (shape.hidden, queries)),
        ("gate_up", (2 * shape.mlp, shape.hidden)),
        ("down", (shape.hidden, shape.mlp)),
    ]
