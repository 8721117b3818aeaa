"""Builds a model and fills it from its checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.model_config import ModelConfig
from engine.model_source import ModelSource
from engine.models.causal_lm import CausalLM
from engine.models.registry import build_model
from engine.parallel.group import ALONE, TensorGroup
from engine.parallel.partition import Partition
from engine.weights.dummy import fill_dummy
from engine.weights.safetensors import read_safetensors

_BUFFERS = ("rotary_emb.inv_freq", "rope_freqs.weight")
"""Tensors that some checkpoints carry and that follow from the configuration."""


def load_model(
    config: EngineConfig,
    source: ModelSource,
    shape: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    max_positions: int,
    group: TensorGroup = ALONE,
) -> CausalLM:
    """Build the model of `source` and fill its parameters, of which this rank has a part.

    Raises:
        ConfigError: the architecture is not supported, or the weights are missing, damaged, or not
            of the configured shape.
    """
    model = build_model(shape, dtype, device, max_positions, group)
    partition = Partition(shape, group)
    if config.load_format == "dummy":
        whole = build_model(shape, dtype, torch.device("meta"), max_positions).slots()
        fill_dummy(model.slots(), whole, partition, config.seed)
    else:
        _fill(model.slots(), _read(config.load_format, source, shape), partition, source)
    model.finalize()
    return model


def _read(
    load_format: str, source: ModelSource, shape: ModelConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    kind = "gguf" if source.kind == "gguf" else "safetensors"
    if load_format not in ("auto", kind):
        raise ConfigError(
            f"load_format is '{load_format}', but {source.name} holds {kind} weights; set it to "
            "'auto'."
        )
    if kind == "gguf":
        from engine.weights.gguf import read_gguf  # its library is not needed elsewhere

        return read_gguf(source.path, shape)
    return read_safetensors(source.path)


def _fill(
    slots: dict[str, torch.Tensor],
    tensors: Iterator[tuple[str, torch.Tensor]],
    partition: Partition,
    source: ModelSource,
) -> None:
    """Copy the part of each tensor to its slot, and insist that every slot got one."""
    missing = dict(slots)
    for name, tensor in tensors:
        slot = missing.pop(name, None)
        if slot is None:
            _check_spare(name, slots, source)
            continue
        part = tensor[partition.part(name, tuple(tensor.shape))]
        if slot.shape != part.shape:
            raise ConfigError(
                f"tensor '{name}' in {source.name} has shape {list(part.shape)}, but the "
                f"configuration asks for {list(slot.shape)}; the checkpoint and its configuration "
                "do not belong together."
            )
        slot.copy_(part)
    if missing:
        raise ConfigError(
            f"{source.name} lacks {len(missing)} tensors, such as '{next(iter(missing))}'; fetch "
            "the checkpoint again."
        )


def _check_spare(name: str, slots: dict[str, torch.Tensor], source: ModelSource) -> None:
    """Accept what can be done without: buffers, and the head of a model that ties it."""
    if not (name.endswith(_BUFFERS) or (name == "lm_head.weight" and name not in slots)):
        raise ConfigError(
            f"{source.name} holds the tensor '{name}', which {len(slots)} known parameters do not "
            "include; the model is of a kind that is not supported."
        )
