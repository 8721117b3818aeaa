"""Shape of a model, read from `config.json` or GGUF metadata without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, frozen=True)
class ModelConfig:
    """What the model code needs to know of a checkpoint."""

    architecture: str
    """Hugging Face class name, such as `LlamaForCausalLM`."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] = field(default_factory=dict)
    """Hugging Face's `rope_scaling` / `rope_parameters`; empty means plain rotary embeddings."""
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """Bias on the q, k and v projections."""
    sliding_window: int | None = None
    """Keys older than this many tokens are out of sight; None sees all."""
    dtype: str = "float32"
    """Type that the checkpoint was saved in."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
