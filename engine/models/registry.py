"""Which class runs which checkpoint."""

from __future__ import annotations

import torch

from engine.errors import ConfigError
from engine.model_config import ModelConfig
from engine.models.causal_lm import CausalLM
from engine.models.llama import LlamaForCausalLM
from engine.models.mistral import MistralForCausalLM
from engine.models.qwen2 import Qwen2ForCausalLM
from engine.models.qwen3 import Qwen3ForCausalLM
from engine.parallel.group import ALONE, TensorGroup

MODELS: dict[str, type[CausalLM]] = {
    model.__name__: model
    for model in (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
}
"""Hugging Face's name of an architecture → the class that runs it."""


def build_model(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    max_positions: int,
    group: TensorGroup = ALONE,
) -> CausalLM:
    """A model whose parameters are still to be filled.

    Raises:
        ConfigError: the architecture or its rope scaling is not supported, or so many ranks cannot
            share it.
    """
    model = MODELS.get(config.architecture)
    if model is None:
        raise ConfigError(
            f"architecture '{config.architecture}' is not supported; "
            f"supported are {', '.join(sorted(MODELS))}."
        )
    return model(config, dtype, device, max_positions, group)
