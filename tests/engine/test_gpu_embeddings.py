"""Embeddings on a GPU: as on the CPU every way, and no reason to leave the CUDA graphs."""

import pytest

from engine.core import EngineCore
from engine.embedding import to_embedding
from engine.runner.cuda_graphs import StepGraphs
from tests.engine.conftest import request, tiny_config
from tests.engine.gpu import needs_gpu
from tests.engine.test_embeddings import AHEAD, SOME_WAYS, mixed, pooled, run_pooled
from tests.engine.test_gpu import cuda_core, tiny_checkpoint  # noqa: F401  # a fixture

pytestmark = needs_gpu
WAYS = SOME_WAYS | AHEAD | {"many rows": {"max_num_seqs": 200, "max_num_batched_tokens": 300}}


@pytest.fixture(scope="module")
def on_cpu(tiny_checkpoint):  # noqa: F811
    config = tiny_config(tiny_checkpoint, device="cpu", load_format="auto")
    return run_pooled(EngineCore(config), mixed())


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("way", WAYS)
def test_same_vectors_every_way(tiny_checkpoint, on_cpu, way, graphs):  # noqa: F811
    core = cuda_core(tiny_checkpoint, enforce_eager=not graphs, **WAYS[way])
    vectors = run_pooled(core, mixed())
    assert vectors.keys() == on_cpu.keys()
    for name, vector in vectors.items():
        assert vector == pytest.approx(on_cpu[name], abs=2e-3), name


def test_decode_steps_replay_while_prompts_are_pooled(tiny_checkpoint, monkeypatch):  # noqa: F811
    """Prompts of one token are pooled in the very steps that decode others."""
    core = cuda_core(tiny_checkpoint)
    alone = {p: run_pooled(core, [pooled(p, [7], p)])[p] for p in ("last", "mean")}
    for i in range(8):
        core.add(request(f"r{i}", [i + 1], max_tokens=64))
    core.step()
    replays, found = [], {}
    replay = StepGraphs.replay

    def spy(graphs, size):
        replays.append(graphs is core.runner._graphs[0])
        return replay(graphs, size)

    monkeypatch.setattr(StepGraphs, "replay", spy)
    for step in range(40):
        pooling = ("last", "mean")[step % 2]
        core.add(pooled(f"{pooling} {step}", [7], pooling))
        for delta in core.step():
            if delta.pooled is not None:
                found[delta.request_id] = to_embedding(delta.pooled, normalize=False)
    assert replays == [True] * 40
    assert len(found) >= 38
    for name, vector in found.items():
        assert vector == pytest.approx(alone[name.split()[0]], abs=1e-4)
