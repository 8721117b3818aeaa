"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) and their long-context variants."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.errors import ConfigError
from engine.model_config import ModelConfig


class RotaryEmbedding(nn.Module):
    """Tables of cosines and signed sines by position, computed once.

    Args:
        config: gives head size, base and scaling.
        max_positions: positions that the tables cover.
        dtype: of queries and keys.
        device: of the tables.

    Raises:
        ConfigError: the scaling is of an unknown type.
    """

    def __init__(
        self, config: ModelConfig, max_positions: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        frequencies, factor = _frequencies(config)
        angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * frequencies
        cos, sin = angles.cos() * factor, angles.sin() * factor
        self._half = frequencies.numel()
        self.table: torch.Tensor | None = None
        """Cosines and sines for the fused kernel, float32 [positions, head_dim]; None on CPU."""
        if device.type == "cuda":
            self.table = torch.cat((cos, sin), dim=-1).to(device)
            return
        self._cos = torch.cat((cos, cos), dim=-1).to(device, dtype)
        self._sin = torch.cat((-sin, sin), dim=-1).to(device, dtype)

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and signed sines, each [tokens, 1, head_dim]; one look-up serves all layers."""
        return self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)

    def rotate(self, x: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Rotate [tokens, heads, head_dim].

        The halves of a head hold the two coordinates, as in Hugging Face checkpoints: rolling by
        half a head swaps them, and the sign of the swap lies in the table.
        """
        cos, sin = cos_sin
        return torch.addcmul(x * cos, torch.roll(x, self._half, -1), sin)


def _frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """Radians a position for each pair of coordinates, float32 [head_dim / 2], and the factor on
    cosines and sines that some scalings ask for."""
    scaling = dict(config.rope_scaling)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        return config.rope_theta**-exponents, 1.0
    if kind not in ROPE_INIT_FUNCTIONS:
        raise ConfigError(
            f"rope scaling '{kind}' is not known; "
            f"known are default, {', '.join(ROPE_INIT_FUNCTIONS)}."
        )
    parameters = {"rope_theta": config.rope_theta, **scaling, "rope_type": kind}
    described = PretrainedConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=parameters,
    )
    inverse, factor = ROPE_INIT_FUNCTIONS[kind](described, torch.device("cpu"))
    return inverse.float(), float(factor)
