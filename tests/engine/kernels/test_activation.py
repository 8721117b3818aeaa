import pytest
import torch

pytest.importorskip("triton")

from engine.kernels.activation import silu_mul

torch.set_num_threads(1)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "size"), [(1, 64), (4, 100), (3, 1024), (2, 2500)])
def test_multiplies_with_the_gate(rows, size, dtype, device):
    torch.manual_seed(0)
    gate_up = (torch.randn(rows, 2 * size) * 5).to(dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    wanted = gate / (1 + (-gate).exp()) * up
    out = silu_mul(gate_up.to(device)).cpu()
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), wanted, rtol=TOLERANCE[dtype], atol=1e-6)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_large_gates_stay_finite(device):
    gate_up = torch.tensor([[-200.0, 200.0, 1.0, 1.0]])
    assert silu_mul(gate_up.to(device)).tolist() == [[0.0, 200.0]]
