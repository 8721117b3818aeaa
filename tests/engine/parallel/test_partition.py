"""Models whose parameters are spread over ranks, against the same models in one piece."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.model_config import read_model_config
from engine.model_source import resolve_model
from engine.models.registry import build_model
from engine.parallel.group import ALONE, TensorGroup
from engine.parallel.partition import vocabulary_share
from engine.parallel.share import share_of
from engine.weights.loader import load_model
from tests.engine.paging import PagedModel
from tests.engine.parallel.threads import run_ranks

SIZES = {
    "vocab_size": 131,  # no number of ranks divides it
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
FAMILIES = {
    "llama tied": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama biases": (LlamaForCausalLM, LlamaConfig(**SIZES, attention_bias=True)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=16)),
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    cls, config = FAMILIES[request.param]
    torch.manual_seed(7)
    model = cls(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    folder = tmp_path_factory.mktemp("family")
    model.save_pretrained(folder)
    return folder


def load(folder, group: TensorGroup, **options) -> PagedModel:
    source = resolve_model(str(folder))
    shape = read_model_config(source)
    config = EngineConfig(model=str(folder), **options)
    cpu = torch.device("cpu")
    model = load_model(config, source, shape, torch.float32, cpu, 256, group)
    return PagedModel(share_of(shape, group.size), model, block_size=16, seed=3)


@torch.inference_mode()
def logits(folder, group: TensorGroup, **options) -> torch.Tensor:
    with torch.inference_mode():  # it is each thread's own
        return load(folder, group, **options).step([(0, [1], 0), (1, list(range(40)), 0)])


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize("size", [2, 4])  # the latter has more ranks than heads of keys
def test_ranks_compute_what_one_does(folder, size, load_format):
    wanted = logits(folder, ALONE, load_format=load_format)
    for found in run_ranks(size, lambda group: logits(folder, group, load_format=load_format)):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_sums_may_be_computed_where_all_ranks_reach_them(folder, monkeypatch):
    monkeypatch.setattr("engine.layers.linear._pack", lambda weight: None)  # as on a GPU
    wanted = logits(folder, ALONE)

    def share(group: TensorGroup) -> torch.Tensor:
        group.summands = torch.full((64, SIZES["hidden_size"]), torch.nan)
        return logits(folder, group)

    for found in run_ranks(2, share):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_rank_holds_its_part_only(folder):
    shape, meta = read_model_config(resolve_model(str(folder))), torch.device("meta")

    def held(group: TensorGroup) -> int:
        slots = build_model(shape, torch.float32, meta, 256, group).slots()
        return sum(slot.numel() for name, slot in slots.items() if "proj.weight" in name)

    assert 2 * held(TensorGroup(0, 2)) == 2 * held(TensorGroup(1, 2)) == held(ALONE)


@pytest.mark.parametrize("size", [3, 5, 7])
def test_sizes_that_do_not_divide_the_model_are_refused(folder, size):
    shape = read_model_config(resolve_model(str(folder)))
    with pytest.raises(ConfigError, match=f"tensor_parallel_size is {size}"):
        share_of(shape, size)


@pytest.mark.parametrize(("vocab", "size"), [(128, 4), (131, 4), (5, 4), (1, 8)])
def test_each_token_belongs_to_one_rank(vocab, size):
    shares = [vocabulary_share(vocab, TensorGroup(rank, size)) for rank in range(size)]
    assert [token for share in shares for token in range(vocab)[share]] == list(range(vocab))
