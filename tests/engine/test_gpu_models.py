"""Each family, through the whole engine, against transformers' own generation."""

from dataclasses import dataclass

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

from engine.core import EngineCore
from tests.engine.conftest import request, tiny_config
from tests.engine.gpu import DEVICES, needs_gpu

SIZES = {
    "vocab_size": 300,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.06,
    "eos_token_id": None,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "llama tied": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=64)),
    "mistral sliding": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=24)),
}
LENGTHS = (1, 20, 90, 290)
"""Of the prompts: within a page, over several, beyond the window and a page of 256."""
NEW_TOKENS = 24
TIE = 1e-3
"""Logits closer than this may change places between implementations in float32."""
HALF_ERROR = {"bfloat16": 0.1, "float16": 0.015}
"""Largest difference of log-probabilities from float32: about twice what was seen on a CPU."""
CLOSE = 8
"""Where two types part, each token is among so many likeliest of the other."""


@dataclass
class Family:
    folder: str
    prompts: list[list[int]]
    tokens: list[list[int]]
    """What transformers generates greedily in float32."""
    logits: list[torch.Tensor]
    """[new tokens, vocab] on the CPU."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    cls, config = FAMILIES[request.param]
    torch.manual_seed(7)
    model = cls(config).eval()
    with torch.no_grad():  # initialisers leave biases at 0 and norms at 1, which would hide errors
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    folder = tmp_path_factory.mktemp("family")
    model.save_pretrained(folder)
    prompts = [torch.randint(0, 300, (length,)).tolist() for length in LENGTHS]
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    found = [generate(model, prompt) for prompt in prompts]
    return Family(str(folder), prompts, *map(list, zip(*found, strict=True)))


@torch.inference_mode()
def generate(model, prompt):
    """Greedy tokens and their logits."""
    ids = torch.tensor([prompt], device=model.device)
    generated = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = generated.sequences[0, len(prompt) :].tolist()
    return tokens, torch.cat(generated.logits).float().cpu()


def run(family, **options):
    """Entries of log-probabilities, by prompt."""
    defaults = {"load_format": "auto", "max_model_len": 320, "max_num_batched_tokens": 128}
    core = EngineCore(tiny_config(family.folder, **{**defaults, **options}))
    entries = {str(i): [] for i in range(len(family.prompts))}
    for name, prompt in zip(entries, family.prompts, strict=True):
        core.add(request(name, prompt, max_tokens=NEW_TOKENS, logprobs=CLOSE))
    while core.has_work:
        for delta in core.step():
            entries[delta.request_id] += delta.logprobs or []
    return list(entries.values())


@pytest.mark.parametrize("device", DEVICES)
def test_float32_gives_the_same_tokens(family, device):
    ours = run(family, device=device, dtype="float32")
    for entries, tokens, logits in zip(ours, family.tokens, family.logits, strict=True):
        chosen = [entry.token_ids[0] for entry in entries]
        assert len(set(tokens)) > 3  # a model that always says the same would prove nothing
        if chosen != tokens:
            at = next(i for i in range(NEW_TOKENS) if chosen[i] != tokens[i])
            assert logits[at, tokens[at]] - logits[at, chosen[at]] < TIE, f"departs at token {at}"
            del entries[at:]
        for entry, expected in zip(entries, logits.log_softmax(-1), strict=False):
            ids = torch.tensor(entry.token_ids)
            torch.testing.assert_close(
                torch.tensor(entry.logprobs), expected[ids], rtol=1e-3, atol=1e-3
            )


@pytest.mark.parametrize(
    ("device", "backend"),
    [
        ("cpu", "torch_sdpa"),
        pytest.param("cuda", "triton", marks=needs_gpu),
        pytest.param("cuda", "flash_attn", marks=needs_gpu),
    ],
)
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("dtype", HALF_ERROR)
def test_half_precision_logprobs_are_close(family, dtype, device, backend, graphs):
    """Until greedy tokens part, logprobs agree; where they part, both are likely (vLLM)."""
    if backend == "flash_attn":
        pytest.importorskip("flash_attn")
    if device == "cpu" and graphs:
        pytest.skip("the CPU has no graphs")
    ours = run(
        family,
        device=device,
        dtype=dtype,
        attention_backend=backend,
        enforce_eager=not graphs,
    )
    compared = 0
    for entries, tokens, logits in zip(ours, family.tokens, family.logits, strict=True):
        assert len(entries) == NEW_TOKENS
        for entry, token, expected in zip(entries, tokens, logits.log_softmax(-1), strict=True):
            chosen = entry.token_ids[0]
            assert chosen in expected.topk(CLOSE).indices
            assert token in entry.token_ids[1:]
            if chosen != token:
                break
            assert entry.logprobs[0] == pytest.approx(expected[token].item(), abs=HALF_ERROR[dtype])
            compared += 1
    assert compared > NEW_TOKENS // 2
