"""Models as they run on CUDA in float32, every kernel but cuBLAS's, against transformers."""

import pytest
import torch

pytest.importorskip("triton")

from engine.attention.triton_paged import TritonAttention
from engine.kernels.activation import silu_mul
from engine.kernels.norm import rms_norm
from engine.kernels.rotary_cache import rotate_and_store
from engine.layers.attention import SelfAttention
from engine.layers.mlp import GatedMLP
from engine.layers.norm import RMSNorm
from tests.engine.paging import PagedModel
from tests.engine.test_models import family, load

__all__ = ["family"]
torch.set_num_threads(1)
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu_models.py does it for real"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
]


def run_as_on_cuda(model):
    """Take the branches that layers take for a CUDA device."""
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module._kernel = rms_norm
        elif isinstance(module, GatedMLP):
            module._activate = silu_mul
        elif isinstance(module, SelfAttention):
            module._fused = rotate_and_store
    rotary, half = model.rotary, model.rotary._half
    rotary.table = torch.cat((rotary._cos[:, :half], rotary._sin[:, half:]), dim=-1)


@torch.inference_mode()
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral sliding"], indirect=True)
def test_prefill_chunks_and_decode_match(family):
    reference, folder = family
    shape, model = load(folder)
    run_as_on_cuda(model)
    paged = PagedModel(shape, model, block_size=16, seed=3, backend=TritonAttention())
    ids = torch.randint(0, 128, (32,), generator=torch.Generator().manual_seed(1)).tolist()
    wanted = reference(torch.tensor([ids])).logits[0]
    chunks = [paged.step([(0, ids[:19], 0)]), paged.step([(0, ids[19:29], 19)])]
    for at in (29, 30):
        chunks.append(paged.step([(0, ids[at : at + 1], at)]))
    mixed = paged.step([(0, ids[31:], 31), (1, ids[:6], 0)])
    near = {"rtol": 1e-4, "atol": 2e-4 * max(1.0, wanted.std().item())}
    torch.testing.assert_close(torch.cat([*chunks, mixed[:1]]), wanted, **near)
    torch.testing.assert_close(mixed[1:], wanted[:6], **near)
