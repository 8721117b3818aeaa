import pytest
import torch

pytest.importorskip("triton")

from engine.kernels import linear
from tests.engine.gpu import DOT_DTYPES

torch.set_num_threads(1)


def operands(rows, inputs, outputs, dtype):
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs) / inputs**0.5
    return [t.to(dtype) for t in (x, weight, torch.randn(outputs), torch.randn(rows, outputs))]


def product_case(rows, inputs, outputs, extras, device, dtype):
    """Arguments of a product on the device, and its result in float64."""
    x, weight, bias, residual = operands(rows, inputs, outputs, dtype)
    bias = bias if "bias" in extras else None
    residual = residual if "residual" in extras else None
    wanted = x.double() @ weight.double().T
    for term in (bias, residual):
        wanted = wanted if term is None else wanted + term.double()
    return [None if t is None else t.to(device) for t in (x, weight, bias, residual)], wanted


def check(rows, inputs, outputs, extras, device, dtype=torch.float16, times=1):
    """The product against float64; every time the same."""
    arguments, wanted = product_case(rows, inputs, outputs, extras, device, dtype)
    outs = [linear.skinny_linear(*arguments).cpu() for _ in range(times)]
    tolerance = 8e-3 if dtype == torch.bfloat16 else 1e-3
    torch.testing.assert_close(outs[0].double(), wanted, rtol=tolerance, atol=1e-3)
    assert outs[0].dtype == dtype
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("extras", ["", "bias", "residual", "bias and residual"])
@pytest.mark.parametrize("rows", [1, 3, 16, 17, linear.MAX_ROWS])
@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_multiplies(rows, extras, dtype, device):
    check(rows, 200, 90, extras, device, dtype)


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(128, 64), (128, 65), (129, 64), (8, 300), (1000, 1), (640, 192)]
)
def test_sizes(inputs, outputs, dtype, device):
    check(5, inputs, outputs, "bias", device, dtype)


@pytest.fixture
def many_processors(monkeypatch):
    """A device that few bands leave idle, so that several programs share each sum."""
    for cached in (linear._plan, linear._scratch):
        cached.cache_clear()
    monkeypatch.setattr(linear, "num_processors", lambda device: 64)
    yield
    for cached in (linear._plan, linear._scratch):
        cached.cache_clear()


@pytest.mark.parametrize("outputs", [64, 100])
@pytest.mark.parametrize("rows", [1, 20])
def test_split_sums_leave_their_counters_as_they_were(rows, outputs, device, many_processors):
    partials, arrivals = linear._scratch(torch.empty(0, device=device).device)
    partials.zero_()
    check(rows, 2100, outputs, "bias and residual", device, times=3)
    assert partials.any()
    assert not arrivals.any()
    check(linear.MAX_ROWS, 1100, 2 * outputs, "", device, times=2)
    check(rows, 2100, outputs, "residual", device, times=2)
