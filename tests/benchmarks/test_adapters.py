"""Adapters over stand-ins of their engines, and transformers' over a tiny model of its own."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from benchmarks.engines import RequestTimes
from benchmarks.engines import trunkline as trunkline_adapter
from benchmarks.engines.transformers_generate import TransformersGenerate
from benchmarks.workloads import Requests
from tests.benchmarks.steps import Step
from tests.engine.conftest import TINY_LLAMA

PROMPTS, OUTPUTS = [[101, 102], [103], [104, 105, 106]], [3, 1, 2]


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))
    return str(tmp_path)


class FakeLLM:
    """Repeats each prompt's last token; remembers what it was built and called with."""

    def __init__(self, **options):
        self.options = options
        self.config = SimpleNamespace(max_num_seqs=2)
        self.calls = []

    def generate(self, prompts, params, use_tqdm):
        self.calls.append((prompts, params))
        return [
            SimpleNamespace(
                outputs=[SimpleNamespace(token_ids=[p["prompt_token_ids"][-1]] * s.max_tokens)],
                metrics=SimpleNamespace(
                    arrival_time=10.0, first_token_time=10.5, finished_time=10.0 + s.max_tokens
                ),
            )
            for p, s in zip(prompts, params, strict=True)
        ]

    def start_profile(self):
        self.profiled = len(self.calls)

    def stop_profile(self):
        return [Step()] * (len(self.calls) - self.profiled)


def requests(batching="continuous", temperature=0.0):
    return Requests(PROMPTS, OUTPUTS, temperature, seed=0, batching=batching)


def test_trunkline_tells_request_times_and_profiles(model, monkeypatch):
    monkeypatch.setattr(trunkline_adapter, "LLM", FakeLLM)
    engine = trunkline_adapter.Trunkline(model, "dummy", max_num_seqs=2)
    assert engine._llm.options["enable_prefix_caching"] is False
    assert engine.run(requests()) == [[102] * 3, [103], [106] * 2]
    assert engine.request_times == [RequestTimes(0.5, float(size)) for size in OUTPUTS]
    assert len(engine.profile(requests())) == 1
    assert engine.run(requests("static")) == [[102] * 3, [103], [106] * 2]
    assert [len(prompts) for prompts, _ in engine._llm.calls[2:]] == [2, 1]
    assert engine.request_times is None


def test_vllm_gets_tokens_and_no_tokenizer(model, monkeypatch):
    vllm, inputs = ModuleType("vllm"), ModuleType("vllm.inputs")
    vllm.LLM, vllm.SamplingParams, inputs.TokensPrompt = FakeLLM, SimpleNamespace, dict
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.inputs", inputs)
    monkeypatch.delitem(sys.modules, "benchmarks.engines.vllm_generate", raising=False)
    from benchmarks.engines.vllm_generate import VllmGenerate

    engine = VllmGenerate(model, "dummy", max_num_seqs=2)
    assert engine._llm.options == {
        "model": model,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "max_num_seqs": 2,
    }
    assert engine.run(requests("static", 0.7)) == [[102] * 3, [103], [106] * 2]
    params = [each for _, listed in engine._llm.calls for each in listed]
    assert all(p.ignore_eos and not p.detokenize and p.temperature == 0.7 for p in params)
    del sys.modules["benchmarks.engines.vllm_generate"]  # it holds on to the stand-in


@pytest.mark.parametrize(
    ("batching", "sizes"), [("continuous", [3]), ("static", [3]), ("single", [1, 1, 1])]
)
def test_transformers_runs_static_batches_of_dummy_weights(model, monkeypatch, batching, sizes):
    engine = TransformersGenerate(model, "dummy")
    seen = []
    run = engine._run
    monkeypatch.setattr(engine, "_run", lambda part: seen.append(len(part.prompts)) or run(part))
    outputs = engine.run(requests(batching, temperature=0.7))
    assert [len(tokens) for tokens in outputs] == OUTPUTS
    assert seen == sizes
