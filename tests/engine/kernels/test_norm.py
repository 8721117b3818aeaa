import pytest
import torch

pytest.importorskip("triton")

from engine.kernels.norm import rms_norm

torch.set_num_threads(1)
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "size"), [(1, 64), (5, 100), (3, 3584), (33, 8)])
def test_normalises(rows, size, dtype, device):
    torch.manual_seed(0)
    x = (torch.randn(rows, size) * 3).to(dtype)
    x[-1] *= 1e-4  # eps counts
    weight = torch.randn(size).to(dtype)
    wide = x.double()
    wanted = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    before = x.clone()
    out = rms_norm(x.to(device), weight.to(device), 1e-5).cpu()
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), wanted, rtol=TOLERANCE[dtype], atol=1e-6)
    assert torch.equal(x, before)
