"""The engine core on a tiny random model: every way to run gives the same tokens."""

import itertools
import random

import msgspec
import pytest

from engine.core import EngineCore
from engine.errors import ConfigError, InvalidRequest
from tests.engine.conftest import request, run_core, tiny_config

GREEDY = {"temperature": 0.0}
SEEDED = {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1}


def prompts(count: int = 24, seed: int = 0) -> list[list[int]]:
    """Prompts of 1 to 100 tokens; a third share a prefix of 40."""
    rng = random.Random(seed)
    shared = [rng.randrange(300) for _ in range(40)]
    drawn = [[rng.randrange(300) for _ in range(rng.randint(1, 100))] for _ in range(count)]
    return [(shared + p[:50] if i % 3 == 0 else p) for i, p in enumerate(drawn)]


def requests(params: dict, count: int = 24):
    return [request(f"r{i}", p, **{"seed": i, **params}) for i, p in enumerate(prompts(count))]


@pytest.fixture(scope="module")
def alone(tiny_model):
    """Each request run by itself, prefilled in one go: the reference."""
    core = EngineCore(tiny_config(tiny_model, enable_prefix_caching=False))
    reference = {
        kind: {r.request_id: run_core(core, [r])[r.request_id] for r in requests(params)}
        for kind, params in (("greedy", GREEDY), ("seeded", SEEDED))
    }
    for outputs in reference.values():  # a model that always says the same would prove nothing
        assert len({token for tokens, _ in outputs.values() for token in tokens}) > 50
    return reference


WAYS = {
    "batch": {},
    "one step ahead": {"async_scheduling": True},
    "chunked": {"max_num_batched_tokens": 16},
    "chunked, one step ahead": {"max_num_batched_tokens": 16, "async_scheduling": True},
    "no prefix cache": {"enable_prefix_caching": False},
    "two-phase": {"two_phase": True},
    "few rows": {"max_num_seqs": 3},
    "small blocks": {"kvcache_block_size": 4, "num_kvcache_blocks": 400},
    "forced preemption": {"force_preempt_every": 3},
    "forced preemption, one step ahead": {"force_preempt_every": 3, "async_scheduling": True},
    "starved": {"num_kvcache_blocks": 20},
    "starved, one step ahead": {"num_kvcache_blocks": 20, "async_scheduling": True},
    "sjf": {"scheduling_policy": "sjf", "max_num_seqs": 4},
    "priority": {"scheduling_policy": "priority", "max_num_seqs": 4},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["greedy", "seeded"])
def test_same_tokens_every_way(tiny_model, alone, kind, way):
    core = EngineCore(tiny_config(tiny_model, **WAYS[way]))
    outputs = run_core(core, requests(GREEDY if kind == "greedy" else SEEDED))
    assert outputs == alone[kind]
    load = core.load()
    if "preemption" in way or "starved" in way:
        assert load.num_preemptions > 0
    if way == "few rows":
        assert load.prefix_hits > 0
    assert load.free_blocks == core.info.num_blocks - 1
    assert load.num_running == load.num_waiting == load.running_tokens == 0


@pytest.mark.parametrize("way", [way for way in WAYS if "ahead" in way or way == "few rows"])
def test_bad_words_see_the_last_tokens_every_way(tiny_model, alone, way):
    """Words are pairs that the outputs would hold; one step ahead, the first is on the device."""
    wires = requests(GREEDY)
    for wire in wires:
        tokens, _ = alone["greedy"][wire.request_id]
        pairs = [[*pair] for pair in itertools.pairwise(tokens)][1:9:2]
        wire.params = msgspec.structs.replace(wire.params, bad_words_token_ids=pairs)
    outputs = run_core(EngineCore(tiny_config(tiny_model, **WAYS[way])), wires)
    for wire in wires:
        tokens, _ = outputs[wire.request_id]
        plain, _ = alone["greedy"][wire.request_id]
        words = wire.params.bad_words_token_ids
        assert not [pair for pair in itertools.pairwise(tokens) if [*pair] in words]
        first = next(i for i, pair in enumerate(itertools.pairwise(plain)) if [*pair] in words)
        assert tokens[: first + 1] == plain[: first + 1]
        assert len(tokens) == len(plain)


def test_prefix_cache_is_hit_by_a_second_run(tiny_model, alone):
    core = EngineCore(tiny_config(tiny_model))
    run_core(core, requests(GREEDY))
    before = core.load().prefix_hits
    assert run_core(core, requests(GREEDY)) == alone["greedy"]
    assert core.load().prefix_hits - before > sum(map(len, prompts())) // 2


def test_salts_do_not_share_blocks(tiny_model):
    core = EngineCore(tiny_config(tiny_model))
    first, second = request("a", list(range(100))), request("b", list(range(100)))
    first.cache_salt, second.cache_salt = "alice", "bob"
    run_core(core, [first])
    run_core(core, [second])
    assert core.load().prefix_hits == 0


@pytest.mark.parametrize("kind", ["greedy", "seeded"])
@pytest.mark.parametrize("cut", [1, 7, 23])
def test_resumed_request_goes_on_exactly(tiny_model, alone, kind, cut):
    core = EngineCore(tiny_config(tiny_model))
    resumed = requests(GREEDY if kind == "greedy" else SEEDED)
    for wire in resumed:
        wire.output_token_ids = alone[kind][wire.request_id][0][:cut]
    assert run_core(core, resumed) == alone[kind]


def test_seed_decides(tiny_model):
    core = EngineCore(tiny_config(tiny_model))
    same = [request(f"a{i}", [5, 6, 7], temperature=1.0, seed=9) for i in range(4)]
    other = request("b", [5, 6, 7], temperature=1.0, seed=10)
    outputs = run_core(core, [*same, other])
    assert len({tuple(outputs[r.request_id][0]) for r in same}) == 1
    assert outputs["b"] != outputs["a0"]


def test_stop_rules(tiny_model, alone):
    reference = alone["greedy"]["r1"][0]
    stop = reference[5]
    first = reference.index(stop)
    core = EngineCore(tiny_config(tiny_model))
    prompt = prompts()[1]
    outputs = run_core(
        core,
        [
            request("stop", prompt, stop_token_ids=[stop]),
            request("late", prompt, stop_token_ids=[stop], min_tokens=first + 2),
            request("short", prompt, max_tokens=3),
            request("long", prompt, max_tokens=None),
        ],
    )
    assert outputs["stop"] == (reference[: first + 1], "stop")
    assert len(outputs["late"][0]) > first + 1
    assert stop not in outputs["late"][0][: first + 2]
    assert outputs["short"] == (reference[:3], "length")
    assert len(outputs["long"][0]) == 256 - len(prompt)


def test_abort_frees_and_leaves_the_others(tiny_model, alone):
    for ahead in (False, True):
        core = EngineCore(tiny_config(tiny_model, async_scheduling=ahead))
        for wire in requests(GREEDY):
            core.add(wire)
        tokens = {f"r{i}": [] for i in range(24)}
        gone = {f"r{i}" for i in range(0, 24, 2)}
        for step in range(10_000):
            if not core.has_work:
                break
            if step == 5:
                core.abort(gone)
            for delta in core.step():
                assert step <= 5 or delta.request_id not in gone
                tokens[delta.request_id] += delta.token_ids
        assert all(tokens[r] == alone["greedy"][r][0] for r in tokens if r not in gone)
        assert core.load().free_blocks == core.info.num_blocks - 1


@pytest.mark.parametrize(
    ("wire", "param"),
    [
        (request("e", []), "prompt"),
        (request("e", [1] * 256), "prompt"),
        (request("e", [300]), "prompt"),
        (request("e", [-1]), "prompt"),
        (request("e", [1], stop_token_ids=[300]), "stop_token_ids"),
        (request("e", [1], logit_bias={300: 1.0}), "logit_bias"),
    ],
)
def test_bad_request_is_refused_and_the_next_runs(tiny_model, alone, wire, param):
    core = EngineCore(tiny_config(tiny_model))
    with pytest.raises(InvalidRequest) as caught:
        core.add(wire)
    assert caught.value.param == param
    assert run_core(core, requests(GREEDY, 1)) == {"r0": alone["greedy"]["r0"]}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_model_len": 4096}, "max_model_len"),
        ({"num_kvcache_blocks": 4}, "KV cache"),
        ({"tensor_parallel_size": 7}, "tensor_parallel_size"),
    ],
)
def test_options_that_do_not_fit(tiny_model, options, words):
    with pytest.raises(ConfigError, match=words):
        EngineCore(tiny_config(tiny_model, **options))


def test_prompt_logprobs_every_way(tiny_model):
    wanted = None
    for options in WAYS.values():
        core = EngineCore(tiny_config(tiny_model, **options))
        wires = [request(f"r{i}", p, prompt_logprobs=2) for i, p in enumerate(prompts(8))]
        scored = {w.request_id: [] for w in wires}
        for wire in wires:
            core.add(wire)
        while core.has_work:
            for delta in core.step():
                scored[delta.request_id] += delta.prompt_logprobs or []
        for wire in wires:
            entries = scored[wire.request_id]
            assert [e.token_ids[0] for e in entries] == wire.prompt_token_ids[1:]
        values = [round(e.logprobs[0], 3) for w in wires for e in scored[w.request_id]]
        wanted = wanted or values
        assert values == pytest.approx(wanted, abs=2e-3)


def test_an_aborted_prompt_is_scored_no_more(tiny_model, monkeypatch):
    core = EngineCore(tiny_config(tiny_model, max_num_batched_tokens=16))
    scores = []
    wants_all = core.runner._wants_all
    monkeypatch.setattr(
        core.runner, "_wants_all", lambda plan: scores.append(wants_all(plan)) or scores[-1]
    )
    core.add(request("other", [3, 1], max_tokens=30))
    core.step()
    core.add(request("gone", [5] * 40, prompt_logprobs=1))
    core.step()
    core.abort(["gone"])
    while core.has_work:
        core.step()
    assert scores[:2] == [False, True]
    assert not any(scores[2:])
