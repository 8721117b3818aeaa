import json
from types import SimpleNamespace

import pytest

from benchmarks import results, sweep
from engine import LLM
from tests.benchmarks.steps import Step
from tests.engine.conftest import TINY_LLAMA

BLOCK = 16


class FakeLLM:
    """Prefills two requests a step, from the prefix cache, while the others decode."""

    def __init__(self, model, num_blocks=100, device_s=0.002, **options):
        self.options = options
        self.core = SimpleNamespace(
            info=SimpleNamespace(
                block_size=BLOCK, num_blocks=num_blocks, max_num_batched_tokens=32, dtype="float32"
            )
        )
        self.device_s = device_s
        self.profiling = False
        self.seen = []

    def start_profile(self):
        self.profiling = True
        self.steps = []

    def stop_profile(self):
        self.profiling = False
        return self.steps

    def generate(self, prompts, params, use_tqdm):
        lengths = [len(prompt["prompt_token_ids"]) for prompt in prompts]
        self.seen.append((len(prompts), lengths[0], params.max_tokens))
        left, waiting = [], list(lengths)
        while self.profiling and (left or waiting):
            fresh = [waiting.pop() for _ in range(min(2, len(waiting)))]
            left = [count for count in left if count]
            rows = len(left) + len(fresh)
            if rows:
                self.steps.append(
                    Step(
                        rows=rows,
                        tokens=rows,
                        context_tokens=rows * lengths[0],
                        decode=not fresh,
                        device_s=self.device_s,
                        idle_s=0.001,
                    )
                )
            left = [count - 1 for count in left] + [params.max_tokens - 1] * len(fresh)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY_LLAMA))
    return str(folder)


def run(model, out, *more):
    words = f"run --model {model} --load-format dummy --out {out} --steps 4 --batches 1 2 8".split()
    sweep.main([*words, "--contexts", "16", "64", *more])
    return results.read(out)


@pytest.fixture
def swept(model, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "LLM", FakeLLM)
    return run(model, tmp_path / "sweep-tiny.json")


def test_every_point_is_measured_beside_its_floor(swept):
    points = {(r["batch"], r["context"]): r for r in swept["records"]}
    assert sorted(points) == [(b, c) for b in (1, 2, 8) for c in (16, 64)]
    for (batch, context), record in points.items():
        assert record["steps"] >= 3
        assert record["context_tokens"] == batch * context
        assert record["step_s"] == 0.002
        assert record["step_and_idle_s"] == 0.003
        assert record["roofline_share"] == pytest.approx(record["floor_s"] / 0.002, abs=1e-4)
    assert points[8, 64]["floor_s"] > points[1, 16]["floor_s"]
    assert {"command", "machine", "versions", "ceilings", "seed"} <= swept.keys()


def test_ranks_have_the_ceilings_of_all_their_gpus(model, tmp_path, monkeypatch, swept):
    monkeypatch.setattr(sweep, "LLM", FakeLLM)
    shared = run(model, tmp_path / "two.json", "--engine", "trunkline:tensor_parallel_size=2")
    for one, two in zip(swept["records"], shared["records"], strict=True):
        assert two["floor_s"] == pytest.approx(one["floor_s"] / 2, abs=1e-8)


def test_what_the_cache_cannot_hold_is_left_out(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "LLM", lambda **options: FakeLLM(num_blocks=30, **options))
    document = run(model, tmp_path / "sweep.json")
    assert (8, 64) not in {(r["batch"], r["context"]) for r in document["records"]}
    assert "batch 8 at 64: more than the KV cache holds" in capsys.readouterr().err


def test_without_device_times_the_host_tells(model, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "LLM", lambda **options: FakeLLM(device_s=None, **options))
    record = run(model, tmp_path / "sweep.json")["records"][0]
    assert record["clock"] == "host"
    assert record["step_s"] == pytest.approx(0.015)
    assert record["step_and_idle_s"] is None


def test_prompts_of_a_row_grow_from_one_another(model, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(sweep, "LLM", lambda **o: made.append(FakeLLM(**o)) or made[0])
    run(model, tmp_path / "sweep.json", "--engine", "trunkline:max_num_batched_tokens=32")
    assert made[0].options["max_num_batched_tokens"] == 32
    fills = [(batch, length) for batch, length, tokens in made[0].seen if tokens == 1]
    assert fills == [(8, 16), (2, 16), (1, 16), (8, 64), (2, 64), (1, 64)]


def test_plots_are_drawn_as_png_and_svg(swept, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    images = tmp_path / "images"
    sweep.main(["plot", str(tmp_path / "sweep-tiny.json"), "--images", str(images)])
    names = sorted(file.name for file in images.iterdir())
    assert names == [
        f"sweep-tiny-{kind}.{ending}"
        for kind in ("roofline", "step-time")
        for ending in ("png", "svg")
    ]
    assert (images / names[0]).read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (images / names[1]).read_text()[:500]
    first = (images / names[1]).read_bytes()
    sweep.main(["plot", str(tmp_path / "sweep-tiny.json"), "--images", str(images)])
    assert (images / names[1]).read_bytes() == first


@pytest.mark.skipif(not hasattr(LLM, "start_profile"), reason="this engine has no profile")
def test_a_tiny_model_is_swept(model, tmp_path):
    document = run(model, tmp_path / "sweep.json", "--engine", "trunkline:cpu_threads=1")
    assert len(document["records"]) == 6
    assert all(record["steps"] >= 3 for record in document["records"])
