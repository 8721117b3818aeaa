import math

import pytest
import torch

from tests.engine.kernels.sampling_reference import kept
from tests.engine.sampling_reference import kept_tokens, params
from tests.engine.test_sampling_truncation import CASES

pytest.importorskip("triton")

from engine.kernels import truncate

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NumPy
torch.set_num_threads(1)
OPTIONS = [params(**case) for case in CASES]


@pytest.fixture(params=[(4096, 8192), (16, 64)], ids=["in registers", "pass by pass"])
def capacity(request, monkeypatch):
    monkeypatch.setattr(truncate, "_CAPACITY", request.param[0])
    monkeypatch.setattr(truncate, "_BLOCK", request.param[1])


def columns(options, vocab_size):
    """top_k, top_p and log(min_p) of rows, [rows, 1] each."""
    top_k = [option.top_k or vocab_size for option in options]
    log_min_p = [math.log(option.min_p) if option.min_p else -math.inf for option in options]
    numbers = torch.tensor([[option.top_p for option in options], log_min_p])
    return torch.tensor(top_k)[:, None], *numbers.T.split(1, dim=1)


def threshold(device, logits, temperature, options):
    """The kernel's thresholds [rows, 1] for lines that belong to the rows in reverse."""
    temperature, *tables = (
        torch.cat([column, column], 1)[:, :1].to(device)
        for column in (temperature, *columns(options, logits.shape[1]))
    )
    rows = torch.arange(len(options)).flip(0)
    found = truncate.truncation_threshold(
        logits.flip(0).to(device), rows.to(device), temperature, *tables
    )
    return found.cpu().flip(0)[:, None]


@pytest.mark.parametrize(
    ("spread", "dtype"),
    [(0.3, torch.float32), (0.3, torch.bfloat16), (20.0, torch.float32), (20.0, torch.float16)],
)
def test_keeps_what_the_reference_keeps(spread, dtype, capacity, device):
    generator = torch.manual_seed(1)
    shape = (len(OPTIONS), 300)
    logits = (torch.randn(shape, generator=generator) * spread).to(dtype)  # bfloat16 brings ties
    temperature = torch.rand(shape[0], 1, generator=generator) + 0.5
    scaled = logits.float() / temperature
    got = scaled >= threshold(device, logits, temperature, OPTIONS)
    assert torch.equal(got, kept(logits, temperature, *columns(OPTIONS, 300)))
    for row, option in enumerate(OPTIONS):
        assert (got[row].numpy() == kept_tokens(scaled[row].double().numpy(), option)).all(), option


def line(kind):
    values = torch.randn(300, generator=torch.manual_seed(2))
    match kind:
        case "equal":
            values[:] = -2.5
        case "one":
            values[1:] = -torch.inf
        case "half banned":
            values[::2] = -torch.inf
        case "outliers":
            values[7], values[8], values[9] = -1e38, 60.0, 60.0
        case "around zero":
            values[:100], values[100:200], values[200:] = -0.0, 0.0, -1e-40
        case "zeros of both signs":
            values *= 0
        case "few":
            values[6:] = -torch.inf
        case "not numbers":
            values[::3] = torch.nan
        case "crowded lane":
            values[5::64] += 30
    return values


KINDS = ["equal", "one", "half banned", "outliers", "around zero", "zeros of both signs", "few"]


@pytest.mark.parametrize("kind", [*KINDS, "not numbers", "crowded lane"])
def test_unusual_lines(kind, capacity, device):
    options = [OPTIONS[i] for i in (1, 5, 7, 9)]
    logits = line(kind).repeat(len(options), 1)
    ones = torch.ones(len(options), 1)
    numbers = logits.where(~logits.isnan(), -torch.inf)
    got = numbers >= threshold(device, logits, ones, options)
    assert torch.equal(got, kept(numbers, ones, *columns(options, 300)))


def test_greedy_and_neutral_rows_keep_everything(device):
    logits = torch.randn(3, 50, generator=torch.manual_seed(0))
    options = [params(top_p=0.1), params(), params(top_k=5)]
    temperature = torch.tensor([[0.0], [0.7], [0.0]])
    assert threshold(device, logits, temperature, options).isneginf().all()


@pytest.mark.parametrize("value", [torch.nan, -torch.inf, torch.inf])
def test_ends_on_lines_without_a_distribution(value, capacity, device):
    logits = torch.full((len(OPTIONS), 300), value)
    logits[:, 5] = torch.inf if value == torch.inf else -torch.inf
    got = threshold(device, logits, torch.ones(len(OPTIONS), 1), OPTIONS)
    assert not got.isnan().any()
