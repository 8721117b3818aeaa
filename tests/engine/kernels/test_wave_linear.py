from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from engine.kernels import wave_linear
from engine.kernels.wave_linear import gated_wave_linear
from engine.layers.mlp import GatedMLP
from tests.engine.gpu import DOT_DTYPES
from tests.engine.kernels.test_linear import operands, product_case

torch.set_num_threads(1)
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def plans_of_this_device():
    wave_linear._plan.cache_clear()
    yield
    wave_linear._plan.cache_clear()


def check(inputs, outputs, extras, device, dtype=torch.float16):
    """The product against float64."""
    arguments, wanted = product_case(wave_linear.ROWS, inputs, outputs, extras, device, dtype)
    out = wave_linear.wave_linear(*arguments).cpu()
    torch.testing.assert_close(out.double(), wanted, rtol=TOLERANCE[dtype], atol=2e-3)
    assert out.dtype == dtype


@pytest.mark.parametrize("extras", ["", "bias", "residual", "bias and residual"])
@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_multiplies(extras, dtype, device):
    check(200, 90, extras, device, dtype)


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(128, 64), (136, 65), (8, 300), (1000, 1)])
def test_sizes(inputs, outputs, dtype, device):
    check(inputs, outputs, "bias", device, dtype)


@pytest.mark.parametrize("processors", [1, 2, 3, 5, 7, 12, 40])
@pytest.mark.parametrize("gated", [False, True])
def test_bands_of_every_width(processors, gated, device, monkeypatch):
    monkeypatch.setattr(wave_linear, "num_processors", lambda device: processors)
    if gated:
        check_gated(136, 230, device)
    else:
        check(136, 230, "bias and residual", device)


def check_gated(inputs, outputs, device, dtype=torch.float16):
    x, weight, _, _ = operands(wave_linear.ROWS, inputs, 2 * outputs, dtype)
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=-1)
    out = gated_wave_linear(x.to(device), weight.to(device)).cpu()
    wanted = gate * torch.sigmoid(gate) * up
    torch.testing.assert_close(out.double(), wanted, rtol=4 * TOLERANCE[dtype], atol=4e-3)
    assert out.dtype == dtype


@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_gates(dtype, device):
    check_gated(200, 90, device, dtype)


def test_the_result_may_lie_in_the_residual(device):
    x, weight, _, residual = (
        t.to(device) for t in operands(wave_linear.ROWS, 64, 50, torch.float16)
    )
    wanted = wave_linear.wave_linear(x, weight, residual=residual)
    out = wave_linear.wave_linear(x, weight, residual=residual, out=residual)
    assert out is residual
    assert torch.equal(out, wanted)


@torch.inference_mode()
def test_layers_use_it_for_just_so_many_rows(device, monkeypatch):
    monkeypatch.setattr(wave_linear, "gains", lambda weight: True)
    shape = SimpleNamespace(hidden_size=64, intermediate_size=40)
    mlp = GatedMLP(shape, torch.float16, device)
    for weight in (mlp.gate_up.weight, mlp.down.weight):
        weight.normal_(std=0.2)
    weights = mlp.gate_up.weight.double(), mlp.down.weight.double()
    calls = []
    for name in ("wave_linear", "gated_wave_linear"):
        monkeypatch.setattr(wave_linear, name, noting(getattr(wave_linear, name), calls))
    for linear in (mlp.gate_up, mlp.down):
        linear._choose_kernels()  # `finalize` does, on a GPU
    mlp._gated_wave = wave_linear.gated_wave_linear
    for rows in (63, 64, 65):
        x, residual = torch.randn(2, rows, 64, device=device, dtype=torch.float16) / 4
        gate, up = (x.double() @ weights[0].T).chunk(2, dim=-1)
        wanted = residual.double() + (torch.nn.functional.silu(gate) * up) @ weights[1].T
        found = mlp(x, residual.clone())
        torch.testing.assert_close(found.double(), wanted, rtol=1e-2, atol=1e-2)
        assert calls == ([64, 64] if rows == 64 else [])
        calls.clear()


def noting(product, calls):
    def noted(x, *others, **options):
        calls.append(len(x))
        return product(x, *others, **options)

    return noted


@pytest.fixture
def h200(monkeypatch):
    monkeypatch.setattr(wave_linear, "num_processors", lambda device: 132)
    monkeypatch.setattr(wave_linear, "shared_memory", lambda device: 227 * 1024)
    return torch.device("cpu")


@pytest.mark.parametrize(
    ("outputs", "gated", "plan"),
    [
        (4608, False, (32, 16, 128, 8)),
        (3584, False, (32, 0, 128, 8)),
        (152064, False, (128, 64, 128, 3)),
        (18944, True, (32, 16, 64, 3)),  # 395 programs, three a multiprocessor
        (3072, True, (16, 0, 128, 4)),
        (9728, True, (64, 16, 128, 4)),
        (200000, True, (128, 16, 64, 5)),
        (27648, True, (128, 16, 64, 5)),  # several a multiprocessor would have two steps in flight
    ],
)
def test_programs_fill_the_device(outputs, gated, plan, h200):
    assert wave_linear._plan(outputs, gated, h200)[:4] == plan


def test_long_sums_of_few_outputs_are_left_to_be_split(monkeypatch):
    monkeypatch.setattr(wave_linear, "overlaps_launches", lambda device: True)
    monkeypatch.setattr(wave_linear, "shared_memory", lambda device: 227 * 1024)
    half = torch.float16
    assert wave_linear.gains(torch.empty(64, 128, dtype=half))
    assert not wave_linear.gains(torch.empty(63, 128, dtype=half))
    assert not wave_linear.gains(torch.empty(64, 100, dtype=half))  # rows are read in 16 bytes


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("memory", [99, 163, 227])
@pytest.mark.parametrize("processors", [20, 48, 132])
def test_every_weight_has_a_plan_that_fits(processors, memory, gated, h200, monkeypatch):
    monkeypatch.setattr(wave_linear, "num_processors", lambda device: processors)
    monkeypatch.setattr(wave_linear, "shared_memory", lambda device: memory * 1024)
    for outputs in range(1, 200_000, 997):
        wave_linear._plan.cache_clear()
        plan = wave_linear._plan(outputs, gated, h200)
        tiles = wave_linear.ROWS + (plan.main + plan.rest) * (1 + gated)
        assert plan.stages >= 3 or memory == 99
        assert 1 <= plan.programs * plan.stages * plan.depth * tiles * 2 <= memory * 1024
