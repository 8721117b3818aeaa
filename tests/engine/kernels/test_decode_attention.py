"""One new token a sequence over random pages, against float64."""

import pytest
import torch

pytest.importorskip("triton")

from engine.attention.triton_paged import TritonAttention
from engine.kernels import decode_attention as kernels
from tests.engine.gpu import DOT_DTYPES
from tests.engine.paging import RandomStep, padded

torch.set_num_threads(1)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
LENGTHS = [1, 500, 16, 129, 257]


def check(lengths, device, *, window=None, block_size=16, heads=4, kv_heads=2, head_dim=64, **more):
    rows = [(row, 1, length - 1) for row, length in enumerate(lengths)]
    step = RandomStep(
        TritonAttention(), rows, block_size, heads, kv_heads, head_dim, device=device, **more
    )
    output = step.attend(window)
    assert step.error(output, window) < TOLERANCE[output.dtype]


@pytest.mark.parametrize("window", [None, 1, 50, 200])
@pytest.mark.parametrize("block_size", [16, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 2), (7, 1)])
def test_groups_pages_and_windows(heads, kv_heads, block_size, window, device):
    check(
        LENGTHS,
        device,
        heads=heads,
        kv_heads=kv_heads,
        block_size=block_size,
        window=window,
    )


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("head_dim", [8, 96, 128, 256])
def test_head_sizes_and_types(head_dim, dtype, device):
    check([3, 140], device, head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("length", [1, 128, 129, 400, 700])
def test_one_sequence_is_split_and_its_counters_reset(length, window, device):
    for _ in range(2):
        check([length], device, heads=2, kv_heads=1, window=window)
    check([length, 200], device, heads=2, kv_heads=1, window=window)
    assert not kernels._arrivals(device).any()


@pytest.mark.parametrize("window", [None, 250])
def test_a_long_sequence_is_split_more_than_others(window, device):
    rows = [(row, 1, length - 1) for row, length in enumerate((1500, 20, 90, 140))]
    step = RandomStep(TritonAttention(), rows, 16, 4, 2, 64, device=device)
    owners = step.layout.spans[:, 0].tolist()
    assert owners.count(0) >= 5 and owners[-2:] == [2, 1]
    assert step.error(step.attend(window), window) < TOLERANCE[torch.float32]
    assert not kernels._arrivals(device).any()


@pytest.mark.parametrize(("sequences", "spans"), [(1, 4), (3, 4), (5, 2), (6, 2), (10, 1), (15, 1)])
def test_padding_in_a_graph_writes_nothing(sequences, spans, device, monkeypatch):
    monkeypatch.setattr(kernels, "num_processors", lambda _: 6)
    counters = torch.zeros(kernels._most_joined(device), dtype=torch.int32, device=device)
    monkeypatch.setattr(kernels, "_arrivals", lambda _: counters)
    marked = []

    def scratch(count, *sizes):
        marked.append(scratch_of(count, *sizes))
        marked[-1][1].fill_(torch.nan)
        return marked[-1]

    scratch_of = kernels._scratch
    monkeypatch.setattr(kernels, "_scratch", scratch)
    rows = [*((row, 1, 511) for row in range(sequences)), (sequences, 60, 0)]
    step = RandomStep(TritonAttention(), rows, 16, 4, 2, 32, device=device)
    step.layout = padded(step.layout, 25)
    assert step.error(step.attend()) < TOLERANCE[torch.float32]
    stats = marked[0][1]
    assert len(stats) <= 2 * 4 * 6 * 32  # 4 programs a multiprocessor, twice; 16 heads of a group
    written = ~stats.view(-1, 32).isnan().any(1)  # by program
    busy = 2 * sequences * spans if spans > 1 else 0
    assert written[:busy].all() and not written[busy:].any()
    assert not counters.any()
