import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.models import SHAPES
from benchmarks.roofline import Ceilings, Shape
from tests.engine.conftest import TINY_LLAMA


def test_matrix_weights_are_those_of_the_model():
    """Against the parameters of transformers' model, without its embedding and its vectors."""
    for folder in SHAPES.iterdir():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        matrices = {n: p.numel() for n, p in model.named_parameters() if p.dim() == 2}
        embedding = matrices.pop("model.embed_tokens.weight")
        matrices.setdefault("lm_head.weight", embedding)
        assert Shape.read(folder, 2).matrix_weights == sum(matrices.values())


def test_a_floor_is_the_larger_of_moving_and_computing(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))
    shape = Shape.read(tmp_path, itemsize=4)
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64
    weights = 2 * layer + 32 * 300
    assert shape.matrix_weights == weights
    assert shape.kv_bytes == 2 * 2 * 2 * 8 * 4
    moved, computed = weights * 4 + 100 * 256, 2 * 5 * weights + 4 * 2 * 4 * 8 * 100
    assert shape.decode_bytes(100) == moved
    assert shape.decode_flops(5, 100) == computed
    slow_memory = Ceilings(bytes_per_second=1e3, flops_per_second=1e12)
    slow_products = Ceilings(bytes_per_second=1e12, flops_per_second=1e3)
    assert shape.decode_floor(5, 100, slow_memory) == pytest.approx(moved / 1e3)
    assert shape.decode_floor(5, 100, slow_products) == pytest.approx(computed / 1e3)


def test_the_7b_shape_costs_what_its_weights_weigh():
    shape = Shape.read(SHAPES / "qwen2.5-7b", itemsize=2)
    assert shape.kv_bytes == 57_344
    assert shape.decode_floor(1, 256, Ceilings()) == pytest.approx(14.14e9 / 4.3e12, rel=0.01)
    assert shape.decode_floor(2048, 2048, Ceilings()) == pytest.approx(0.0367, rel=0.01)
