"""Ranks on GPUs, one engine after another in one process: each must leave its group as it goes."""

import pytest
import torch

from tests.engine.conftest import request, run_core
from tests.engine.test_core import prompts
from tests.engine.test_gpu import cuda_core, tiny_checkpoint  # noqa: F401  # a fixture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs"),
]
WAYS = {
    "graphs": {},
    "eager": {"enforce_eager": True},
    "graphs again": {},
    "kernels for few rows": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("way", WAYS)
def test_two_gpus_give_the_tokens_of_one(tiny_checkpoint, way):  # noqa: F811
    wires = [request(f"r{i}", prompt, max_tokens=20) for i, prompt in enumerate(prompts(8))]
    wanted = run_core(cuda_core(tiny_checkpoint), wires)
    found = run_core(cuda_core(tiny_checkpoint, tensor_parallel_size=2, **WAYS[way]), wires)
    assert found.keys() == wanted.keys()
    if "dtype" not in WAYS[way]:
        assert found == wanted
