"""Many new tokens a sequence over random pages, against float64."""

import pytest
import torch

pytest.importorskip("triton")

from engine.attention.triton_paged import TritonAttention
from engine.kernels import prefill_attention as kernels
from tests.engine.gpu import DOT_DTYPES
from tests.engine.paging import RandomStep, padded

torch.set_num_threads(1)
# Rows of a tile beyond the sequence divide 0 by 0 and are not stored.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
BATCHES = {
    "one prompt": [(0, 150, 0)],
    "two tokens": [(0, 2, 0)],
    "a chunk over a prefix": [(0, 40, 130)],
    "different lengths": [(0, 3, 0), (1, 70, 65), (2, 64, 0), (3, 2, 100)],
    "beside decodes": [(0, 1, 50), (1, 1, 0), (2, 40, 0), (3, 17, 90)],
}


def check(rows, device, *, window=None, block_size=16, heads=4, kv_heads=2, head_dim=32, **more):
    step = RandomStep(
        TritonAttention(), rows, block_size, heads, kv_heads, head_dim, device=device, **more
    )
    output = step.attend(window)
    assert step.error(output, window) < TOLERANCE[output.dtype]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("window", [None, 1, 24, 100])
def test_chunks_and_windows(batch, window, device):
    check(BATCHES[batch], device, window=window, heads=2, kv_heads=1)


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("batch", ["one prompt", "beside decodes"])
def test_padding_changes_nothing(batch, window, device, monkeypatch):
    monkeypatch.setattr(kernels, "num_processors", lambda _: 1)  # programs take several turns
    step = RandomStep(TritonAttention(), BATCHES[batch], 16, 2, 1, 32, device=device)
    wanted = step.attend(window)
    step.layout = padded(step.layout, 16)
    assert torch.equal(step.attend(window), wanted)


@pytest.mark.parametrize("block_size", [4, 64, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 2), (7, 1)])
def test_groups_and_pages(heads, kv_heads, block_size, device):
    check([(0, 35, 70)], device, heads=heads, kv_heads=kv_heads, block_size=block_size)


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("head_dim", [8, 64, 96, 256])
def test_head_sizes_and_types(head_dim, window, dtype, device):
    rows = [(0, 70, 66), (1, 10, 0)]
    check(rows, device, head_dim=head_dim, dtype=dtype, window=window, heads=2, kv_heads=1)
