"""Embeddings: pooled hidden states, against transformers', however the engine gets there."""

from collections import Counter

import numpy as np
import pytest
import torch

from engine import LLM, EngineConfig, InvalidRequest
from engine.core import EngineCore
from engine.embedding import POOLED_PARAMS, to_embedding
from engine.request import EngineRequest
from tests.engine.conftest import request, run_core, tiny_config
from tests.engine.test_core import prompts
from tests.engine.test_models import family  # noqa: F401  # a fixture

POOLINGS = ("last", "mean")
STARVED = {"num_kvcache_blocks": 20, "max_num_batched_tokens": 16, "max_num_seqs": 8}
SOME_WAYS = {
    "batch": {},
    "chunked": {"max_num_batched_tokens": 16},
    "two-phase": {"two_phase": True},
    "few rows": {"max_num_seqs": 3},
    "no prefix cache": {"enable_prefix_caching": False},
    "forced preemption": {"force_preempt_every": 3},
    "starved": STARVED,
}
AHEAD = {f"{name}, ahead": {**way, "async_scheduling": True} for name, way in SOME_WAYS.items()}


def pooled(rid: str, prompt: list[int], pooling: str, **options) -> EngineRequest:
    return EngineRequest(rid, prompt, POOLED_PARAMS, pooling=pooling, **options)


def run_pooled(core, wires) -> dict[str, np.ndarray]:
    """Run requests, of which some are pooled; request id → vector of those."""
    for wire in wires:
        core.add(wire)
    vectors = {}
    while core.has_work:
        for delta in core.step():
            if delta.pooled is not None:
                assert (delta.token_ids, delta.finish_reason) == ([], "stop")
                assert delta.request_id not in vectors
                vectors[delta.request_id] = to_embedding(delta.pooled, normalize=False)
    core.check_invariants()
    assert core.load().free_blocks == core.info.num_blocks - 1
    return vectors


def unit(vector: torch.Tensor) -> list[float]:
    return (vector / vector.norm()).tolist()


@torch.inference_mode()
def test_every_family_as_transformers(family):  # noqa: F811
    reference, folder = family
    llm = LLM(str(folder), max_num_batched_tokens=32, num_kvcache_blocks=64, cpu_threads=1)
    ids = [[token % 128 for token in prompt] for prompt in prompts(4)] + [[5]]
    asked = [{"prompt_token_ids": prompt} for prompt in ids]
    for pooling in POOLINGS:
        outputs = llm.embed(asked, pooling=pooling, use_tqdm=False)
        for prompt, output in zip(ids, outputs, strict=True):
            hidden = reference.model(torch.tensor([prompt])).last_hidden_state[0]
            wanted = hidden[-1] if pooling == "last" else hidden.mean(dim=0)
            assert output.prompt_token_ids == prompt
            assert output.outputs.embedding == pytest.approx(unit(wanted), abs=1e-4)


def mixed() -> list[EngineRequest]:
    """Every prompt is pooled in both ways, and generates; twice, so that the cache has it."""
    wires = []
    for i, prompt in enumerate(prompts(8)):
        wires += [pooled(f"{pooling} {i}", prompt, pooling) for pooling in POOLINGS]
        wires.append(request(f"tokens {i}", prompt, max_tokens=40))
        wires += [pooled(f"{pooling} again {i}", prompt, pooling) for pooling in POOLINGS]
    return wires


def count_starts(core) -> Counter[str]:
    """How often each request is given a row."""
    starts: Counter[str] = Counter()
    execute = core.runner.execute

    def spy(plan):
        starts.update(new_row.request_id for new_row in plan.new_rows)
        return execute(plan)

    core.runner.execute = spy
    return starts


@pytest.fixture(scope="module")
def alone(tiny_model):
    core = EngineCore(tiny_config(tiny_model, enable_prefix_caching=False))
    found = {}
    for wire in mixed():
        found |= run_pooled(core, [wire])
    return found


@pytest.mark.parametrize("way", SOME_WAYS | AHEAD)
def test_same_vectors_every_way(tiny_model, alone, way):
    core = EngineCore(tiny_config(tiny_model, **(SOME_WAYS | AHEAD)[way]))
    starts = count_starts(core)
    vectors = run_pooled(core, mixed())
    assert vectors.keys() == alone.keys()
    for name, vector in vectors.items():
        assert vector == pytest.approx(alone[name], abs=1e-5), name
    if way == "starved":
        assert any(count > 1 for name, count in starts.items() if name.startswith("mean"))


def test_neighbours_generate_what_they_would(tiny_model):
    wires = [wire for wire in mixed() if wire.pooling is None]
    core = EngineCore(tiny_config(tiny_model, max_num_batched_tokens=32))
    wanted = run_core(core, wires)
    found = run_core(EngineCore(tiny_config(tiny_model, max_num_batched_tokens=32)), mixed())
    assert {name: found[name] for name in wanted} == wanted


def test_a_mean_takes_nothing_from_the_cache_and_leaves_its_blocks_there(tiny_model):
    core = EngineCore(tiny_config(tiny_model))
    prompt = list(range(40))

    def num_hits(wire: EngineRequest) -> int:
        before = core.load().prefix_hits
        run_pooled(core, [wire])
        return core.load().prefix_hits - before

    assert num_hits(pooled("a", prompt, "mean")) == 0
    assert num_hits(pooled("b", prompt, "last")) == 32
    assert num_hits(pooled("c", prompt, "mean")) == 0
    assert num_hits(pooled("d", prompt, "last", cache_salt="other")) == 0


def test_a_row_forgets_an_aborted_prompt(tiny_model):
    core = EngineCore(tiny_config(tiny_model, max_num_seqs=1, max_num_batched_tokens=8))
    prompt = [7] * 20
    wanted = run_pooled(core, [pooled("first", prompt, "mean")])["first"]
    core.add(pooled("gone", [9] * 30, "mean"))
    core.step()
    core.abort(["gone"])
    assert run_pooled(core, [pooled("next", prompt, "mean")])["next"] == pytest.approx(wanted)


def test_a_prompt_may_be_as_long_as_the_model_allows(tiny_model):
    for ahead in (False, True):
        core = EngineCore(tiny_config(tiny_model, async_scheduling=ahead))
        limit = core.info.max_model_len
        for pooling in POOLINGS:
            assert run_pooled(core, [pooled("r", [3] * limit, pooling)])["r"].shape == (32,)
            with pytest.raises(InvalidRequest, match=f"{limit} tokens or fewer") as caught:
                core.add(pooled("long", [3] * (limit + 1), pooling))
            assert caught.value.param == "prompt"


def test_dimensions_and_normalize():
    stored = np.array([3.0, 4.0, 12.0], dtype="<f4").tobytes()
    assert to_embedding(stored).tolist() == pytest.approx([3 / 13, 4 / 13, 12 / 13])
    assert to_embedding(stored, 2).tolist() == pytest.approx([0.6, 0.8])
    assert to_embedding(stored, 2, normalize=False).tolist() == [3.0, 4.0]
    assert to_embedding(bytes(12)).tolist() == [0.0, 0.0, 0.0]
    assert to_embedding(stored).dtype == np.float32
    with pytest.raises(ValueError, match="without a vector"):
        to_embedding(b"")


def test_offline_options(tiny_model):
    llm = LLM(**EngineConfig.model_dump(tiny_config(tiny_model), exclude_defaults=True))
    prompt = {"prompt_token_ids": [5, 6, 7]}

    def embed(**options) -> list[float]:
        return llm.embed(prompt, use_tqdm=False, **options)[0].outputs.embedding

    whole, raw = embed(), embed(normalize=False)
    assert np.linalg.norm(whole) == pytest.approx(1.0)
    assert raw == pytest.approx((np.array(whole) * np.linalg.norm(raw)).tolist(), rel=1e-5)
    assert embed(dimensions=8, normalize=False) == raw[:8]
    for options, param in [
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": 33}, "dimensions"),
        ({"pooling": "max"}, "pooling"),
        ({"priority": [1, 2]}, "priority"),
    ]:
        with pytest.raises(InvalidRequest) as caught:
            embed(**options)
        assert caught.value.param == param
    with pytest.raises(InvalidRequest):
        llm.embed({"prompt_token_ids": []}, use_tqdm=False)
