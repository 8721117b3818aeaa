"""Probes at toy sizes in Triton's interpreter, their clocks replaced; timing itself needs a GPU."""

import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.probes import (
    ceilings,
    decode_attention,
    flash,
    pages,
    prefill_attention,
    products,
    rotary,
    sampling,
)
from benchmarks.probes.bench import Bench
from benchmarks.probes.weights import weight_sizes
from tests.benchmarks.toy_bench import DEVICE, SHAPES, TINY, ToyBench


def fake_flash_attn(seen):
    """The contract of flash-attn's functions, in place of what they compute."""

    def with_kvcache(query, keys, values, *, cache_seqlens, block_table, causal, **more):
        count, one, heads, dim = query.shape
        assert keys.shape == values.shape and keys.shape[1] % 256 == 0
        assert keys.shape[3] == dim and heads % keys.shape[2] == 0 and one == 1 and causal
        assert cache_seqlens.dtype == block_table.dtype == torch.int32
        added = 0
        if "k" in more:
            assert more["k"].shape == more["v"].shape == (count, 1, *keys.shape[2:])
            assert more["rotary_cos"].shape == more["rotary_sin"].shape
            assert more["rotary_cos"].shape[1] == dim // 2
            assert more["rotary_cos"].dtype == query.dtype
            assert more["rotary_interleaved"] is False
            added = 1
        for row, length in enumerate(cache_seqlens.tolist()):
            assert block_table[row, : math.ceil((length + added) / keys.shape[1])].all()
        seen.append(("decode", count, bool(added), cache_seqlens.tolist()))
        return torch.zeros_like(query)

    def varlen(query, keys, values, *, cu_seqlens_q, cu_seqlens_k, block_table, **more):
        new, whole = cu_seqlens_q.diff(), cu_seqlens_k.diff()
        assert len(query) == new.sum() and more["causal"] and keys.shape[1] % 256 == 0
        assert more["max_seqlen_q"] == new.max() and more["max_seqlen_k"] == whole.max()
        assert len(block_table) == len(new) and cu_seqlens_q.dtype == torch.int32
        seen.append(("prefill", new.tolist(), whole.tolist()))
        return torch.zeros_like(query)

    return SimpleNamespace(flash_attn_with_kvcache=with_kvcache, flash_attn_varlen_func=varlen)


@pytest.fixture
def flash_attn(monkeypatch):
    seen = []
    for module in (decode_attention, prefill_attention, rotary):
        monkeypatch.setattr(module, "find_flash_attn", lambda: fake_flash_attn(seen))
    return seen


@pytest.fixture
def no_flash_attn(monkeypatch):
    for module in (decode_attention, prefill_attention, rotary):
        monkeypatch.setattr(module, "find_flash_attn", lambda: None)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_weights_of_a_layer():
    assert weight_sizes(TINY) == [
        ("qkv", (128, 32)),
        ("o", (32, 64)),
        ("gate_up", (96, 32)),
        ("down", (32, 48)),
    ]


def test_copies_outgrow_the_cache():
    bench = ToyBench(cold_bytes=1000)
    assert [bench.copies(size) for size in (1, 100, 300, 10**6)] == [512, 10, 4, 2]


@pytest.mark.parametrize("page", [16, 256])
def test_pages_of_sequences_are_distinct(page):
    lengths = [1, 256, 257, 500]
    cached = pages.place(ToyBench(cold_bytes=300_000), TINY, lengths, page)
    assert len(cached.tables) == math.ceil(300_000 / (1014 * 128))
    used = [
        table[row, : math.ceil(length / page)].tolist()
        for table in cached.tables
        for row, length in enumerate(lengths)
    ]
    flat = [number for numbers in used for number in numbers]
    keys, values = cached.paged_caches()
    assert sorted(flat) == list(range(1, len(keys)))
    assert keys.shape == values.shape == (len(flat) + 1, page, 2, 16)
    assert cached.last_slots(cached.tables[0]).tolist() == [
        used[row][-1] * page + (length - 1) % page for row, length in enumerate(lengths)
    ]
    assert cached.spans(1)[:, 0].tolist() == [3, 2, 1, 0]


def test_lengths_are_the_same_every_time_and_around_the_mean():
    lengths = pages.draw_lengths(500, 450)
    assert lengths == pages.draw_lengths(500, 450)
    assert min(lengths) >= 225 and max(lengths) <= 675
    assert sum(lengths) / 500 == pytest.approx(450, rel=0.05)


def test_decode_attention(flash_attn):
    bench = ToyBench()
    found = list(
        decode_attention.measure(
            bench, SHAPES, batches=(1, 3), contexts=(40,), pages=(64, 16), uneven=(300, 9)
        )
    )
    assert [(r["method"], r["shape"]["batch"], r["shape"]["page"]) for r in found] == [
        (method, batch, page)
        for batch in (1, 3, 2)
        for method, page in (
            ("flash_attn_with_kvcache", 256),
            ("decode_attention", 64),
            ("decode_attention", 16),
        )
    ]
    tokens = sum(pages.draw_lengths(3, 40))
    assert found[5]["shape"]["tokens"] == tokens
    assert found[5]["gb_s"] == round(tokens * 2 * 2 * 16 * 2 / 6 / 1e3, 1)
    assert [r["shape"]["longest"] for r in found[6:]] == [300] * 3
    assert {entry[1:3] for entry in flash_attn} == {(1, False), (3, False), (2, False)}


def test_decode_attention_attends():
    bench, lengths = ToyBench(), [5, 70]
    cached = pages.place(bench, TINY, lengths, 16)
    for value in cached.caches[1]:
        value.fill_(0.5)
    call = decode_attention.kernel_calls(bench, TINY, cached)[0]
    call()
    torch.testing.assert_close(call.args[-1], torch.full_like(call.args[-1], 0.5))


def test_prefill_attention(flash_attn):
    cases = ((2, 40, 0), (1, 20, 30))
    found = list(prefill_attention.measure(ToyBench(), SHAPES, cases=cases))
    assert [r["method"] for r in found] == ["flash_attn_varlen_func", "prefill_attention"] * 2
    pairs = 20 * 30 + 20 * 21 // 2
    assert found[3]["tflop_s"] == round(4 * 4 * 16 * pairs / 4 / 1e6, 1)
    assert [*map(tuple, flash_attn[:: len(flash_attn) // 2])] == [
        ("prefill", [40, 40], [40, 40]),
        ("prefill", [20], [50]),
    ]


def test_rotary_appends_the_last_token_in_every_way(flash_attn):
    found = list(rotary.measure(ToyBench(), SHAPES, batches=(2,), context=40))
    assert [r["method"] for r in found] == [
        rotary.IN_KERNEL,
        rotary.THEN_FLASH,
        rotary.THEN_KERNEL,
    ]
    lengths = pages.draw_lengths(2, 40)
    assert ("decode", 2, True, [length - 1 for length in lengths]) in flash_attn
    assert ("decode", 2, False, lengths) in flash_attn


def test_rotary_writes_where_the_attention_reads():
    bench = ToyBench()
    cached = pages.place(bench, TINY, [3, 40], 16)
    before = cached.caches[1].clone()
    angles = rotary._angles(TINY.head_dim, DEVICE)
    calls = rotary._fused(bench, TINY, cached, angles, [lambda: None] * len(cached.tables))
    for call in calls:
        call()
    changed = (cached.caches[1] != before).any(-1).any(-1).nonzero().flatten().tolist()
    assert changed == sorted(
        slot for table in cached.tables for slot in cached.last_slots(table).tolist()
    )


@pytest.mark.parametrize("probe", [decode_attention, prefill_attention, rotary])
def test_without_flash_attn_its_part_is_skipped_with_a_sentence(probe, no_flash_attn):
    small = {
        decode_attention: {"batches": (1,), "contexts": (20,), "pages": (16,), "uneven": ()},
        prefill_attention: {"cases": ((1, 20, 0),)},
        rotary: {"batches": (1,), "context": 20},
    }
    first, *rest = probe.measure(ToyBench(), SHAPES, **small[probe])
    assert first["skipped"] == flash.MISSING
    assert len(rest) == 1 and "microseconds" in rest[0]


def test_products():
    bench = ToyBench()
    found = list(products.measure(bench, SHAPES, copy_bytes=1 << 12, rows=(1, 128)))
    assert found[0]["method"] == "copy" and found[0]["gb_s"] == 8.2
    assert [(r["method"], r["shape"]["weight"], r["shape"]["rows"]) for r in found[1:]] == [
        (method, weight, rows)
        for weight, cublas in (
            ("qkv", "linear"),
            ("o", "addmm_"),
            ("gate_up", "linear"),
            ("down", "addmm_"),
        )
        for method, rows in ((cublas, 1), ("skinny_linear", 1), (cublas, 128))
    ]
    moved = 2 * (32 * 48 + 128 * (48 + 32 + 32))
    assert found[-1]["gb_s"] == round(moved / found[-1]["microseconds"] / 1e3, 1)
    linear, skinny = bench.outputs[1], bench.outputs[2]
    for one, other in zip(linear, skinny, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


def test_ceilings():
    shapes = {"tiny": TINY, "another": TINY}
    found = list(ceilings.measure(ToyBench(), shapes, copy_bytes=1 << 12, side=8, rows=(4,)))
    copy, burst, square, model = found
    assert copy["gb_s"] == round(2 * (1 << 12) / 1e3, 1)
    assert burst["microseconds"] == 2.0  # the median of 2, 1 and a million
    assert square["microseconds"] == 6.0 and square["shape"]["products"] == 10
    assert model["shape"] == {"model": "tiny", "rows": 4, "products": 8}
    assert model["microseconds"] == 8.0 and model["passes"] == 4
    flops = 2 * 4 * 2 * (128 * 32 + 32 * 64 + 96 * 32 + 32 * 48)
    assert model["tflop_s"] == round(flops / 8 / 1e6, 1)
    assert model["first_tflop_s"] == round(flops / 4 / 1e6, 1)
    assert model["gpu"] == {"clocks.sm": 1400.0, "clocks_event_reasons.sw_power_cap": 1.0}


def test_sampling():
    bench = ToyBench()
    found = list(sampling.measure(bench, SHAPES, batches=(1, 3)))
    assert [r["shape"]["batch"] for r in found] == [1, 1, 1, 3, 3, 3]
    assert found[3]["gb_s"] == round(3 * 600 * 2 / 4 / 1e3, 1)
    noisy, greedy, truncated = bench.outputs[3:]
    for tokens in (*noisy, *greedy, *truncated):
        assert tokens.shape == (3,) and ((tokens >= 0) & (tokens < 600)).all()
    assert any((a != b).any() for a, b in zip(noisy, greedy, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="timing needs a CUDA GPU")
def test_clocks():
    bench = Bench(DEVICE)
    x = bench.randn(1 << 26)
    times = [bench.time([x.sin_]), *bench.burst(x.sin_), bench.sustain([x.sin_], 0.1).settled]
    bound = 2 * x.nbytes / 10e12 * 1e6  # no GPU reads and writes at 10 TB/s
    assert len(times) == 12 and all(bound < time < 1e4 for time in times)
