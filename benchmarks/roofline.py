"""The least time that a decode step can take: bytes and FLOPs counted from a model's shape.

The roofline model: S. Williams, A. Waterman, D. Patterson, "Roofline: An Insightful Visual
Performance Model for Multicore Architectures", CACM 52(4), 2009.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Ceilings:
    """What the device can do; the defaults were measured on one H200."""

    bytes_per_second: float = 4.30e12
    """Of a copy, reads and writes counted."""
    flops_per_second: float = 790e12
    """Of a matrix product in the type that the model computes in."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder-only transformer that decide what a decode step costs."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    itemsize: int
    """Bytes of a weight and of an entry of the KV cache."""

    @classmethod
    def read(cls, folder: Path, itemsize: int) -> Shape:
        """Read `config.json` in `folder`."""
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        heads = config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            mlp=config["intermediate_size"],
            vocabulary=config["vocab_size"],
            itemsize=itemsize,
        )

    @property
    def matrix_weights(self) -> int:
        """Weights of all matrix products of a token: of every layer q, k, v, o and the three of the
        gated MLP, and the head. Biases and norms, below 0.1 %, are left out."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.mlp) + self.head_weights

    @property
    def head_weights(self) -> int:
        """Weights of the output head; the embedding of a token is one row of as large a matrix."""
        return self.hidden * self.vocabulary

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV cache of one token, all layers together."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.itemsize

    def decode_bytes(self, context_tokens: float) -> float:
        """Bytes that a decode step must move.

        Every matrix weight once, head included, and the keys and values of all `context_tokens`
        (summed over the rows). Activations are left out: they stay in the caches.
        """
        return self.matrix_weights * self.itemsize + context_tokens * self.kv_bytes

    def decode_flops(self, rows: int, context_tokens: float) -> float:
        """Floating-point operations of a decode step of `rows` requests.

        Two for each weight and row, and for attention four for each query head, key and dimension
        (a multiplication and an addition in q·k, and in the weighted sum of values).
        """
        attention = 4 * self.layers * self.heads * self.head_dim * context_tokens
        return 2 * rows * self.matrix_weights + attention

    def decode_floor(self, rows: int, context_tokens: float, ceilings: Ceilings) -> float:
        """Least seconds of a decode step: the larger of moving its bytes and doing its FLOPs."""
        return max(
            self.decode_bytes(context_tokens) / ceilings.bytes_per_second,
            self.decode_flops(rows, context_tokens) / ceilings.flops_per_second,
        )
