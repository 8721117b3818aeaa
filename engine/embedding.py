"""Embeddings: the hidden states of a prompt, pooled into one vector."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from engine.errors import InvalidRequest
from engine.sampling_params import SamplingParams

Pooling = Literal["last", "mean"]
"""Which of a prompt's hidden states, after the model's last norm, make up its vector: that of the
last token, or all of them, averaged."""

POOLED_PARAMS = SamplingParams(max_tokens=1, temperature=0.0, seed=0)
"""Options of a request that is pooled: its vector comes where others have their first token."""

_SMALLEST_NORM = 1e-12
"""A shorter vector is divided by this instead; torch's `normalize` has the same bound."""


def check_pooling(pooling: str) -> None:
    """Check the name of a pooling.

    Raises:
        InvalidRequest: there is none of this name.
    """
    if pooling not in get_args(Pooling):
        raise InvalidRequest(f"pooling must be one of {', '.join(get_args(Pooling))}.", "pooling")


def check_dimensions(dimensions: int | None, hidden_size: int) -> None:
    """Check how long embeddings are to be.

    Raises:
        InvalidRequest: the model's vectors are shorter.
    """
    if dimensions is not None and not 1 <= dimensions <= hidden_size:
        raise InvalidRequest(
            f"dimensions must be from 1 to {hidden_size}, the hidden size of the model.",
            "dimensions",
        )


def to_embedding(
    pooled: bytes, dimensions: int | None = None, normalize: bool = True
) -> np.ndarray:
    """What is handed out of a pooled vector.

    Args:
        pooled: float32 [hidden size], little-endian; see `TokenDelta.pooled`.
        dimensions: so many of its numbers are kept, the first ones; None keeps all. That is what
            Matryoshka models (Kusupati et al., 2022) are trained for.
        normalize: scale what is kept to the Euclidean length 1.

    Returns:
        float32 [dimensions], little-endian.

    Raises:
        ValueError: there is none.
    """
    if not pooled:
        raise ValueError("the engine ended the request without a vector; is it an older one?")
    vector = np.frombuffer(pooled, dtype="<f4")[:dimensions]
    if normalize:
        vector = vector / np.maximum(np.linalg.norm(vector), np.float32(_SMALLEST_NORM))
    return vector
