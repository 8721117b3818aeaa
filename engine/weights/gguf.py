"""Weights of a GGUF file, dequantized on the way in."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from engine.errors import ConfigError
from engine.gguf_header import GgufTensor, read_gguf_header
from engine.model_config import ModelConfig

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""llama.cpp's name of a layer's parameter → Hugging Face's."""

_THREADS = 2
"""numpy lets go of the interpreter in its inner loops, so a second thread helps; more do not."""


def read_gguf(path: Path, shape: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor, dequantized to float32 unless it was stored wider, under Hugging Face's name.

    Raises:
        ConfigError: the file is damaged, or quantized in a way that cannot be read.
    """
    header = read_gguf_header(path)
    data = np.memmap(path, mode="r")[header.data_offset :]
    llama = header.metadata.get("general.architecture") == "llama"

    def read(item: tuple[str, GgufTensor]) -> tuple[str, torch.Tensor]:
        name, tensor = item
        values = torch.from_numpy(_dequantize(path, name, tensor, data))
        if llama and name.endswith(("attn_q.weight", "attn_k.weight")):
            values = _unpermute(values, shape.head_dim)
        return _hugging_face_name(name), values

    with ThreadPoolExecutor(_THREADS) as threads:
        yield from threads.map(read, header.tensors.items())


def _hugging_face_name(name: str) -> str:
    if not name.startswith("blk."):
        return _TOP_NAMES.get(name, name)
    _, layer, parameter, kind = name.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES.get(parameter, parameter)}.{kind}"


def _dequantize(path: Path, name: str, tensor: GgufTensor, data: np.ndarray) -> np.ndarray:
    try:
        kind = GGMLQuantizationType(tensor.ggml_type)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        rows = tuple(reversed(tensor.shape))
        num_bytes = int(np.prod(rows)) // block * block_bytes
        raw = data[tensor.offset : tensor.offset + num_bytes]
        if len(raw) < num_bytes:
            raise ConfigError(f"{path} ends before the data of '{name}'; fetch it again.")
        packed = raw.reshape(*rows[:-1], rows[-1] // block * block_bytes)
        return np.require(dequantize(packed, kind), requirements=("C", "W"))
    except (ValueError, NotImplementedError, KeyError) as error:
        raise ConfigError(
            f"tensor '{name}' of {path} cannot be dequantized ({error}); use another quantization."
        ) from error


def _unpermute(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Undo llama.cpp's interleaving of the two rotary halves of each head."""
    heads = weight.view(-1, head_dim // 2, 2, weight.shape[-1])
    return heads.transpose(1, 2).reshape(weight.shape)
