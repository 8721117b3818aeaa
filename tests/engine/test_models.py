"""Each family against transformers' own classes, on tiny random checkpoints in float32."""

from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.model_config import ModelConfig, read_model_config
from engine.model_source import resolve_model
from engine.models.registry import build_model
from engine.weights.loader import load_model
from tests.engine.paging import PagedModel

SIZES = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "llama tied": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama biases": (LlamaForCausalLM, LlamaConfig(**SIZES, attention_bias=True)),
    "llama3 rope": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE)),
    "linear rope": (
        LlamaForCausalLM,
        LlamaConfig(
            **SIZES,
            rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        ),
    ),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=None, head_dim=16)),
    "mistral sliding": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=24)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
    "qwen2 yarn": (Qwen2ForCausalLM, Qwen2Config(**SIZES, rope_parameters=YARN_ROPE)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=16)),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(transformers' model, the folder it was saved to)."""
    cls, config = FAMILIES[request.param]
    torch.manual_seed(7)
    reference = cls(config).eval()
    with torch.no_grad():  # initialisers leave biases at 0 and norms at 1, which would hide errors
        for name, parameter in reference.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    folder = tmp_path_factory.mktemp("family")
    reference.save_pretrained(folder)
    return reference, folder


def load(folder: Path, **options):
    source = resolve_model(str(folder))
    shape = read_model_config(source)
    config = EngineConfig(model=str(folder), **options)
    model = load_model(config, source, shape, torch.float32, torch.device("cpu"), 256)
    return shape, model


@torch.inference_mode()
def test_prefill_chunks_and_decode_match(family):
    reference, folder = family
    paged = PagedModel(*load(folder), block_size=16, seed=3)
    ids = torch.randint(0, 128, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    wanted = reference(torch.tensor([ids])).logits[0]
    spread = wanted.std().item()
    assert spread > 0.1
    whole = paged.step([(0, ids, 0)])
    chunked = [paged.step([(1, ids[a:b], a)]) for a, b in ((0, 37), (37, 38), (38, 80))]
    decoded = [paged.step([(1, ids[i : i + 1], i)]) for i in range(80, 100)]
    torch.testing.assert_close(whole, wanted, rtol=1e-4, atol=1e-4 * max(1.0, spread))
    joined = torch.cat([*chunked, *decoded])
    torch.testing.assert_close(joined, wanted, rtol=1e-4, atol=1e-4 * max(1.0, spread))


@torch.inference_mode()
def test_mixed_batch_matches(family):
    reference, folder = family
    paged = PagedModel(*load(folder), block_size=16, seed=5)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(0, 128, (n,), generator=generator).tolist() for n in (90, 3, 40, 60)]
    paged.step([(row, ids[:-1], 0) for row, ids in enumerate(prompts[:3])])
    step = [(row, ids[-1:], len(ids) - 1) for row, ids in enumerate(prompts[:3])]
    logits = paged.step([*step, (3, prompts[3], 0)])
    ends = torch.stack([reference(torch.tensor([ids])).logits[0, -1] for ids in prompts])
    torch.testing.assert_close(logits[[0, 1, 2, -1]], ends, rtol=1e-4, atol=5e-4)
    last = len(logits) - 1
    again = paged.step([*step, (3, prompts[3], 0)], wanted=[0, 1, 2, last])
    torch.testing.assert_close(again, ends, rtol=1e-4, atol=5e-4)
    one = paged.step([(3, prompts[3], 0)], wanted=[59])
    torch.testing.assert_close(one, ends[3:], rtol=1e-4, atol=5e-4)


def test_unknown_architecture_is_named():
    shape = ModelConfig("MambaForCausalLM", 8, 8, 8, 1, 1, 1, 8, 8)
    with pytest.raises(ConfigError, match=r"MambaForCausalLM.*LlamaForCausalLM"):
        build_model(shape, torch.float32, torch.device("cpu"), 8)
