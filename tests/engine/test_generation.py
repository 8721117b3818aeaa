"""The bundled model says what transformers says, however the engine runs it."""

import json
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.runner import build
from tests.engine.conftest import request, run_core

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "greedy.json").read_text())["rows"]
TIE = 1e-4
"""Logits closer than this may change places between machines."""
MOST_KINDS = [row for row in GOLDEN[::3] if len(row["prompt"]) <= 300 or row is GOLDEN[60]]
SHORT = [row for row in GOLDEN[::6] if len(row["prompt"]) <= 128]
WAYS = {
    "one at a time": {"max_num_seqs": 1, "enable_prefix_caching": False},
    "batches of 4": {"max_num_seqs": 4},
    "two threads": {"cpu_threads": 2},
    "chunked": {"max_num_batched_tokens": 96},
    "one step ahead": {"async_scheduling": True},
    "forced preemption": {"force_preempt_every": 7, "max_num_seqs": 8},
    "two-phase": {"two_phase": True},
    "sjf": {"scheduling_policy": "sjf", "max_num_seqs": 8},
    "starved": {"num_kvcache_blocks": 140, "max_model_len": 2100},
}
FEW_BLOCKS = {"num_kvcache_blocks": 30, "max_model_len": 400}
"""Starve the short prompts."""


@pytest.fixture(scope="module", autouse=True)
def one_model():
    """Engines share their weights: to load them takes longer than most of these tests."""
    load, models = build.load_model, {}

    def shared(config, source, shape, dtype, device, max_positions, group):
        key = dtype, max_positions
        if key not in models:
            models.clear()  # two would be a gigabyte
            models[key] = load(config, source, shape, dtype, device, max_positions, group)
        return models[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "load_model", shared)
        yield


def core(**options) -> EngineCore:
    """In one thread, since tests run beside others: two would mostly wait for each other."""
    return EngineCore(EngineConfig(**{"max_num_seqs": 32, "cpu_threads": 1, **options}))


def wires(rows, resume_after: int = 0, length: int = 64):
    return [
        request(str(i), row["prompt"], row["tokens"][:resume_after], max_tokens=length)
        for i, row in enumerate(rows)
    ]


def assert_golden(outputs, rows, length: int = 64):
    for i, row in enumerate(rows):
        tokens, reason = outputs[str(i)]
        assert (len(tokens), reason) == (length, "length")
        if tokens != row["tokens"][:length]:
            at = next(j for j in range(length) if tokens[j] != row["tokens"][j])
            assert row["gaps"][at] < TIE, f"prompt {i} departs at token {at}"


def test_golden_prompts():
    assert len(GOLDEN) == 64
    assert min(len(row["prompt"]) for row in MOST_KINDS) == 1
    assert max(len(row["prompt"]) for row in MOST_KINDS) == 1000
    engine = core()
    assert_golden(run_core(engine, wires(MOST_KINDS, length=40)), MOST_KINDS, 40)
    assert engine.load().prefix_hits > 0  # some prompts share a prefix


@pytest.mark.parametrize("way", WAYS)
def test_same_tokens_every_way(way):
    rows, length = (SHORT, 40) if way == "starved" else (SHORT, 24)
    if way == "one at a time":
        rows = rows[::3]  # it is slow
    engine = core(**WAYS[way] | (FEW_BLOCKS if way == "starved" else {}))
    assert_golden(run_core(engine, wires(rows, length=length)), rows, length)
    if way in ("forced preemption", "starved"):
        assert engine.load().num_preemptions > 0


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_all_golden_prompts_every_way(way):
    engine = core(**WAYS[way])
    assert_golden(run_core(engine, wires(GOLDEN)), GOLDEN)


def test_prefix_cached_and_resumed():
    engine = core()
    assert_golden(run_core(engine, wires(SHORT, length=24)), SHORT, 24)
    before = engine.load().prefix_hits
    assert_golden(run_core(engine, wires(SHORT, length=24)), SHORT, 24)
    assert engine.load().prefix_hits > before
    assert_golden(run_core(engine, wires(SHORT, 18, 24)), SHORT, 24)


def test_same_seed_same_tokens_alone_in_a_batch_and_after_preemption():
    params = {"temperature": 0.8, "top_p": 0.95, "max_tokens": 20, "seed": 1234}
    prompt = GOLDEN[2]["prompt"]
    needle = request("needle", prompt, **params)
    crowd = [
        request(f"r{i}", row["prompt"][:100], temperature=1.0, seed=i, max_tokens=20)
        for i, row in enumerate(GOLDEN[::6])
    ]
    alone = run_core(core(max_num_seqs=1), [needle])["needle"]
    other_seed = request("needle", prompt, **{**params, "seed": 4321})
    assert run_core(core(), [other_seed])["needle"] != alone
    assert run_core(core(), [*crowd[:6], needle, *crowd[6:]])["needle"] == alone
    preempted = core(force_preempt_every=5)
    assert run_core(preempted, [needle, *crowd[:3]])["needle"] == alone
    assert preempted.load().num_preemptions > 0


def test_bfloat16_logprobs_are_close():
    """Where the two types part, each token is among the other's likeliest (vLLM's criterion)."""
    full, half = (
        run_with_logprobs(core(dtype=dtype), GOLDEN[:12:3]) for dtype in ("float32", "bfloat16")
    )
    for i in full:
        for at, (a, b) in enumerate(zip(full[i], half[i], strict=True)):
            assert a.token_ids[0] in b.token_ids[1:], f"prompt {i}, token {at}"
            assert b.token_ids[0] in a.token_ids[1:], f"prompt {i}, token {at}"
            if a.token_ids[0] != b.token_ids[0]:
                break
            assert a.logprobs[0] == pytest.approx(b.logprobs[0], abs=0.3)


def run_with_logprobs(engine, rows, length: int = 16):
    entries = {str(i): [] for i in range(len(rows))}
    for i, row in enumerate(rows):
        engine.add(request(str(i), row["prompt"], max_tokens=length, logprobs=5))
    while engine.has_work:
        for delta in engine.step():
            entries[delta.request_id] += delta.logprobs or []
    assert all(len(found) == length for found in entries.values())
    return entries


def test_threads_are_set():
    for count in (2, 1):
        core(cpu_threads=count)
        assert torch.get_num_threads() == count
