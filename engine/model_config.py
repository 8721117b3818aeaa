"""Shape of a model, read from `config.json` or GGUF metadata without torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config_keys import ConfigKeys, read_json_object
from engine.gguf_header import GgufHeader, read_gguf_header
from engine.model_source import ModelSource


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


ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""`model_type` of config.json, or `general.architecture` of a GGUF file → class name."""

_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "qwen3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
}
"""What transformers' configuration classes assume for keys that config.json leaves out."""

_DTYPES = ("float32", "bfloat16", "float16")
_GGUF_DTYPES = {0: "float32", 1: "float16"}
"""`general.file_type` → type; every quantized type was made from weights in bfloat16 or better."""


def read_model_config(source: ModelSource) -> ModelConfig:
    """Read the shape of a model.

    Args:
        source: a directory with config.json (and generation_config.json and tokenizer_config.json,
            which may name further end-of-sequence tokens), or a GGUF file.

    Raises:
        ConfigError: a key is missing, has a bad value, or asks for something unsupported; the
            message names the key.
    """
    if source.kind == "gguf":
        return config_from_gguf(read_gguf_header(source.path), source.path)
    return _config_from_directory(source.path)


def _family(keys: ConfigKeys, key: str) -> tuple[str, str]:
    """The model family named under `key`, and its class name."""
    family = keys.values.get(key)
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise keys.error(key, f"is {family!r}; supported are {', '.join(ARCHITECTURES)}")
    return family, ARCHITECTURES[family]


def _config_from_directory(folder: Path) -> ModelConfig:
    path = folder / "config.json"
    raw = read_json_object(path)
    family, architecture = _family(ConfigKeys(raw, path), "model_type")
    keys = ConfigKeys(_DEFAULTS[family] | raw, path)
    _refuse_unsupported(keys)
    theta, scaling = _rope(keys)
    bos = keys.token_ids("bos_token_id")
    return _checked(
        keys,
        ModelConfig(
            architecture=architecture,
            vocab_size=keys.integer("vocab_size"),
            hidden_size=(hidden_size := keys.integer("hidden_size")),
            intermediate_size=keys.integer("intermediate_size"),
            num_layers=keys.integer("num_hidden_layers"),
            num_heads=(num_heads := keys.integer("num_attention_heads")),
            num_kv_heads=keys.integer("num_key_value_heads", num_heads),
            head_dim=keys.integer("head_dim", hidden_size // num_heads),
            max_position_embeddings=keys.integer("max_position_embeddings"),
            rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=keys.flag("tie_word_embeddings"),
            attention_bias=family == "qwen2" or keys.flag("attention_bias"),
            sliding_window=_sliding_window(keys, family),
            dtype=_dtype(keys),
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=_unique([*keys.token_ids("eos_token_id"), *_more_eos_ids(folder)]),
        ),
    )


def _checked(keys: ConfigKeys, config: ModelConfig) -> ModelConfig:
    if config.num_heads % config.num_kv_heads:
        raise keys.error(
            "num_key_value_heads",
            f"({config.num_kv_heads}) must divide the number of heads ({config.num_heads})",
        )
    for token in config.eos_token_ids:
        if token >= config.vocab_size:
            raise keys.error("eos_token_id", f"({token}) is not below vocab_size")
    return config


def _refuse_unsupported(keys: ConfigKeys) -> None:
    if (activation := keys.values.get("hidden_act", "silu")) != "silu":
        raise keys.error("hidden_act", f"is {activation!r}; only 'silu' is supported")
    if keys.flag("mlp_bias"):
        raise keys.error("mlp_bias", "is true, which is not supported")
    if keys.values.get("quantization_config"):
        raise keys.error("quantization_config", "is set; give an unquantized or a GGUF checkpoint")


def _dtype(keys: ConfigKeys) -> str:
    """`dtype` is `torch_dtype` in files written before transformers 5."""
    key = "dtype" if keys.values.get("dtype") else "torch_dtype"
    value = keys.values.get(key) or "float32"
    if value not in _DTYPES:
        raise keys.error(key, f"is {value!r}; supported are {', '.join(_DTYPES)}")
    return str(value)


def _rope(keys: ConfigKeys) -> tuple[float, dict[str, Any]]:
    """Base and scaling of the rotary embeddings.

    transformers 5 writes both to `rope_parameters`; before, there were `rope_theta` and
    `rope_scaling`, whose type was at first called `type`.
    """
    key = "rope_parameters" if keys.values.get("rope_parameters") else "rope_scaling"
    scaling = keys.values.get(key) or {}
    if not isinstance(scaling, dict) or any(isinstance(each, dict) for each in scaling.values()):
        raise keys.error(key, f"must be one set of parameters for all layers, got {scaling!r}")
    merged = ConfigKeys({"rope_theta": keys.values.get("rope_theta")} | scaling, keys.where)
    theta = merged.number("rope_theta", 10000.0)
    if keys.values.get("partial_rotary_factor", scaling.get("partial_rotary_factor", 1.0)) != 1.0:
        raise keys.error("partial_rotary_factor", "must be 1; others are not supported")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return theta, {}
    rest = {k: v for k, v in scaling.items() if k not in ("type", "rope_type", "rope_theta")}
    if kind != "linear":
        longest = keys.integer("max_position_embeddings")
        rest.setdefault("original_max_position_embeddings", longest)
    return theta, {"rope_type": kind, **rest}


def _sliding_window(keys: ConfigKeys, family: str) -> int | None:
    """The window, when the model uses one.

    Qwen's configurations name a window that only `use_sliding_window` turns on, and only for the
    layers from `max_window_layers` on (or those that `layer_types` names).
    """
    if family == "llama" or keys.values.get("sliding_window") is None:
        return None
    window = keys.integer("sliding_window")
    if family == "mistral":
        return window
    if not keys.flag("use_sliding_window"):
        return None
    num_layers = keys.integer("num_hidden_layers")
    first = keys.integer("max_window_layers", minimum=0)
    kinds = keys.values.get("layer_types") or [
        "full_attention" if layer < first else "sliding_attention" for layer in range(num_layers)
    ]
    if len(set(kinds)) > 1:
        raise keys.error("use_sliding_window", "for some layers only is not supported")
    return window if kinds[0] == "sliding_attention" else None


def _more_eos_ids(folder: Path) -> list[int]:
    """End-of-sequence tokens of generation, and of the tokenizer.

    Chat models are often fine-tuned from a base model whose config.json still names the base's
    end-of-text token, while a turn ends with the one that these files name.
    """
    ids: list[int] = []
    generation = folder / "generation_config.json"
    if generation.is_file():
        ids += ConfigKeys(read_json_object(generation), generation).token_ids("eos_token_id")
    path = folder / "tokenizer_config.json"
    if path.is_file():
        ids += _tokenizer_eos(read_json_object(path), folder / "tokenizer.json")
    return ids


def _tokenizer_eos(tokenizer_config: dict[str, Any], tokenizer_file: Path) -> list[int]:
    text = tokenizer_config.get("eos_token")
    if isinstance(text, dict):
        text = text.get("content")
    added = tokenizer_config.get("added_tokens_decoder")
    if added:
        return [int(i) for i, token in added.items() if token.get("content") == text]
    if text is None or not tokenizer_file.is_file():
        return []
    tokens = read_json_object(tokenizer_file).get("added_tokens") or ()
    return [token["id"] for token in tokens if token.get("content") == text]


def _unique(ids: Iterable[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(ids))


def config_from_gguf(header: GgufHeader, path: Path) -> ModelConfig:
    """Read the shape of a model from the metadata of its GGUF file.

    Raises:
        ConfigError: as for `read_model_config`.
    """
    keys = ConfigKeys(header.metadata, path)
    family, architecture = _family(keys, "general.architecture")
    if "token_embd.weight" not in header.tensors:
        raise keys.error("token_embd.weight", "is missing; give the whole model in one file")
    hidden_size, vocab_size = header.tensors["token_embd.weight"].shape
    num_heads = keys.integer(f"{family}.attention.head_count")
    rotated = keys.integer(f"{family}.rope.dimension_count", hidden_size // num_heads)
    ends = (keys.token_ids(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot", "eom"))
    bos = keys.token_ids("tokenizer.ggml.bos_token_id")
    return _checked(
        keys,
        ModelConfig(
            architecture=architecture,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=keys.integer(f"{family}.feed_forward_length"),
            num_layers=keys.integer(f"{family}.block_count"),
            num_heads=num_heads,
            num_kv_heads=keys.integer(f"{family}.attention.head_count_kv", num_heads),
            head_dim=keys.integer(f"{family}.attention.key_length", rotated),
            max_position_embeddings=keys.integer(f"{family}.context_length"),
            rms_norm_eps=keys.number(f"{family}.attention.layer_norm_rms_epsilon", 1e-6),
            rope_theta=keys.number(f"{family}.rope.freq_base", 10000.0),
            rope_scaling=_gguf_rope_scaling(keys, header, family),
            tie_word_embeddings="output.weight" not in header.tensors,
            attention_bias="blk.0.attn_q.bias" in header.tensors,
            dtype=_GGUF_DTYPES.get(header.metadata.get("general.file_type", -1), "bfloat16"),
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=_unique(token for ids in ends for token in ids),
        ),
    )


def _gguf_rope_scaling(keys: ConfigKeys, header: GgufHeader, family: str) -> dict[str, Any]:
    if "rope_freqs.weight" in header.tensors:
        raise keys.error(
            "rope_freqs.weight",
            "(scaled rotary embeddings as a tensor) is not supported; give the model's safetensors",
        )
    prefix = f"{family}.rope.scaling"
    kind = header.metadata.get(f"{prefix}.type", "none")
    if kind == "none":
        return {}
    scaling = {"rope_type": kind, "factor": keys.number(f"{prefix}.factor", 1.0)}
    if kind == "yarn":
        original = f"{prefix}.original_context_length"
        scaling["original_max_position_embeddings"] = keys.integer(original)
    return scaling
