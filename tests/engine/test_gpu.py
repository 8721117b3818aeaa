"""The engine on a GPU: attention against float64, and the same tokens as on the CPU every way."""

import json

import pytest
import torch

from engine.attention import select_backend
from engine.core import EngineCore
from engine.embedding import POOLED_PARAMS
from engine.request import EngineRequest
from engine.runner.cuda_graphs import StepGraphs
from tests.engine.conftest import TINY_LLAMA, request, run_core, tiny_config
from tests.engine.gpu import needs_gpu
from tests.engine.paging import BATCHES, RandomStep
from tests.engine.test_core import GREEDY, SEEDED, WAYS, prompts, requests

pytestmark = needs_gpu
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
CUDA_WAYS = WAYS | {
    "not ahead": {"async_scheduling": False},
    "chunked, not ahead": {"max_num_batched_tokens": 16, "async_scheduling": False},
    "many rows": {"max_num_seqs": 200, "max_num_batched_tokens": 300},
    "one row": {"max_num_seqs": 1},
    "blocks of 64": {"kvcache_block_size": 64},
    "blocks of 256": {"kvcache_block_size": 256},
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(14, 2, 64), (28, 4, 128), (8, 2, 256)]
)
@pytest.mark.parametrize(
    ("name", "block_size", "dtype"),
    [
        ("flash_attn", 256, torch.bfloat16),
        ("flash_attn", 256, torch.float16),
        ("triton", 16, torch.bfloat16),
        ("triton", 256, torch.bfloat16),
        ("triton", 64, torch.float16),
        ("triton", 16, torch.float32),
        ("torch_sdpa", 16, torch.float32),
    ],
)
def test_attention_against_float64(
    batch, window, heads, kv_heads, head_dim, name, block_size, dtype
):
    if name == "flash_attn":
        pytest.importorskip("flash_attn")
        if head_dim == 256 and dtype == torch.float16:
            pytest.skip("not in the build of flash-attn on the test host")
    backend = select_backend(name, torch.device("cuda"), dtype, head_dim, block_size)
    step = RandomStep(backend, BATCHES[batch], block_size, heads, kv_heads, head_dim, dtype, "cuda")
    assert step.error(step.attend(window), window) < TOLERANCE[dtype]


def cuda_core(model, **options):
    defaults = {
        "device": "cuda",
        "dtype": "float32",
        "load_format": "auto",
        "kvcache_block_size": 16,
    }
    return EngineCore(tiny_config(model, **{**defaults, **options}))


@pytest.fixture
def replays(monkeypatch):
    """(rows, size of the graph) of each step that a graph ran, those of the start included."""
    found, rows = [], [0]
    size_for, replay = StepGraphs.size_for, StepGraphs.replay

    def spy_on_plan(graphs, plan):
        rows[0] = len(plan.rows)
        return size_for(graphs, plan)

    def spy_on_replay(graphs, size):
        found.append((rows[0], size))
        return replay(graphs, size)

    monkeypatch.setattr(StepGraphs, "size_for", spy_on_plan)
    monkeypatch.setattr(StepGraphs, "replay", spy_on_replay)
    return found


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("way", CUDA_WAYS)
@pytest.mark.parametrize("kind", ["greedy", "seeded"])
def test_same_tokens_every_way(tiny_checkpoint, on_cpu_alone, replays, kind, way, graphs):
    core = cuda_core(tiny_checkpoint, enforce_eager=not graphs, **CUDA_WAYS[way])
    replays.clear()
    outputs = run_core(core, requests(GREEDY if kind == "greedy" else SEEDED))
    assert outputs == on_cpu_alone[kind]
    load = core.load()
    if "preemption" in way or "starved" in way:
        assert load.num_preemptions > 0
    assert load.free_blocks == core.info.num_blocks - 1
    assert bool(replays) == graphs
    assert all(rows <= size for rows, size in replays)
    if way == "many rows" and graphs:
        assert any(rows < size for rows, size in replays)


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_torch_backend_runs_as_the_last_resort(tiny_checkpoint, on_cpu_alone, graphs):
    core = cuda_core(tiny_checkpoint, attention_backend="torch_sdpa", enforce_eager=not graphs)
    assert run_core(core, requests(GREEDY)) == on_cpu_alone["greedy"]


def test_prompt_logprobs_as_on_the_cpu(tiny_checkpoint):
    wires = [request(f"r{i}", p, prompt_logprobs=2) for i, p in enumerate(prompts(8))]
    scored = {}
    for device in ("cpu", "cuda"):
        core = cuda_core(tiny_checkpoint, device=device, max_num_batched_tokens=64)
        for wire in wires:
            core.add(wire)
        deltas = [delta for _ in iter(lambda c=core: c.has_work, False) for delta in core.step()]
        entries = [(d.request_id, e) for d in deltas for e in d.prompt_logprobs or []]
        entries.sort(key=lambda entry: entry[0])
        scored[device] = [(name, e.token_ids[0], *e.logprobs) for name, e in entries]
    assert len(scored["cuda"]) == sum(len(wire.prompt_token_ids) - 1 for wire in wires)
    for on_cpu, on_gpu in zip(scored["cpu"], scored["cuda"], strict=True):
        assert on_gpu[:2] == on_cpu[:2]
        assert on_gpu[2:] == pytest.approx(on_cpu[2:], abs=2e-3)


def test_chunks_that_sample_nothing_pile_up_on_a_slow_device(
    tiny_checkpoint, on_cpu_alone, monkeypatch
):
    """The host launches all chunks of a prompt before the device has begun with the first."""
    core = cuda_core(tiny_checkpoint, max_num_batched_tokens=8, max_num_seqs=4)
    execute = core.runner.execute

    def execute_late(plan):
        torch.cuda._sleep(30_000_000)  # cycles: more than ten milliseconds
        return execute(plan)

    monkeypatch.setattr(core.runner, "execute", execute_late)
    longest = max(requests(GREEDY), key=lambda wire: len(wire.prompt_token_ids))
    assert len(longest.prompt_token_ids) > 80
    outputs = run_core(core, [longest])
    assert outputs[longest.request_id] == on_cpu_alone["greedy"][longest.request_id]


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_launching_a_step_never_waits_for_the_device(tiny_checkpoint, monkeypatch, graphs, ahead):
    core = cuda_core(
        tiny_checkpoint,
        enforce_eager=not graphs,
        async_scheduling=ahead,
        max_num_batched_tokens=64,
        enable_prefix_caching=False,
    )
    wires = [*requests(SEEDED, 12), *(request(f"g{i}", p) for i, p in enumerate(prompts(6, 1)))]
    wires += [request(f"l{i}", p, logprobs=3) for i, p in enumerate(prompts(6, 2))]
    wires += [
        EngineRequest(f"{pooling} {i}", p, POOLED_PARAMS, pooling=pooling)
        for pooling in ("last", "mean")
        for i, p in enumerate(prompts(6, 3))
    ]
    first = run_core(core, wires)  # kernels are compiled
    execute, mixed, decodes = core.runner.execute, [], []

    def execute_guarded(plan):
        (decodes if plan.total_tokens == len(plan.rows) else mixed).append(plan)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return execute(plan)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(core.runner, "execute", execute_guarded)
    assert run_core(core, wires) == first
    assert mixed
    assert decodes


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_profile_measures_the_device(tiny_checkpoint, graphs):
    core = cuda_core(tiny_checkpoint, enforce_eager=not graphs)
    core.start_profile()
    run_core(core, requests(GREEDY))
    records = core.stop_profile()
    assert len(records) >= 24
    assert {record.decode for record in records} == {True, False}
    assert all(record.device_s > 0 for record in records)
    assert records[0].idle_s is None
    assert all(record.idle_s >= 0 for record in records[1:])
    assert sum(record.tokens for record in records) >= sum(map(len, prompts())) // 2
    run_core(core, requests(GREEDY))
    assert core.stop_profile() is records  # nothing is kept once it is stopped


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_one_row_is_deterministic(wide_model, monkeypatch, dtype):
    from engine.kernels import linear

    calls, skinny_linear = [], linear.skinny_linear

    def spy(x, *others):
        calls.append(len(x))
        return skinny_linear(x, *others)

    monkeypatch.setattr(linear, "skinny_linear", spy)
    core = EngineCore(
        tiny_config(wide_model, device="cuda", dtype=dtype, enable_prefix_caching=False)
    )
    runs = []
    for _ in range(3):
        core.add(request("r", list(range(100)), max_tokens=64, logprobs=4))
        entries = []
        while core.has_work:
            entries += [e for delta in core.step() for e in delta.logprobs or []]
        runs.append([(entry.token_ids, entry.logprobs) for entry in entries])
    assert calls
    assert len(runs[0]) == 64
    assert runs[0] == runs[1] == runs[2]


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory):
    """A tiny random model as a checkpoint, so that CPU and GPU run the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {k: v for k, v in TINY_LLAMA.items() if k not in ("architectures", "torch_dtype")}
    folder = tmp_path_factory.mktemp("checkpoint")
    LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def on_cpu_alone(tiny_checkpoint):
    """Each request by itself on the CPU."""
    core = EngineCore(
        tiny_config(tiny_checkpoint, device="cpu", load_format="auto", max_num_seqs=1)
    )
    outputs = {
        kind: run_core(core, requests(params))
        for kind, params in (("greedy", GREEDY), ("seeded", SEEDED))
    }
    for found in outputs.values():  # a model that always says the same would prove nothing
        assert len({token for tokens, _ in found.values() for token in tokens}) > 50
    return outputs


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """Wide enough for the kernel of few rows to split its sums."""
    folder = tmp_path_factory.mktemp("wide")
    sizes = {
        "vocab_size": 2000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps({**TINY_LLAMA, **sizes}))
    return str(folder)


def test_step_times_are_those_of_the_graphs(tiny_checkpoint, replays):
    times = cuda_core(tiny_checkpoint).info.step_times
    sizes = {size for _, size in replays}
    for found in (times.decode, times.mixed):
        assert found
        assert set(found) <= sizes
        assert list(found) == sorted(found)
        assert list(found.values()) == sorted(found.values())
        assert min(found.values()) > 0
    assert times.token_s > 0
    eager = cuda_core(tiny_checkpoint, enforce_eager=True).info.step_times
    assert not eager.decode
    assert not eager.mixed
