import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams
from tests.engine.tokenizer_cases import NUMBERS, SOURCE_CODE, TEXTS

TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory that holds nothing but a tiny model's config.json, for dummy weights."""
    path: Path = tmp_path_factory.mktemp("tiny-llama")
    (path / "config.json").write_text(json.dumps(TINY_LLAMA))
    return str(path)


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory):
    """A small tokenizer of SentencePiece's, and the folder with its file."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("sp")
    (folder / "text.txt").write_text("\n".join([*TEXTS, *NUMBERS, SOURCE_CODE]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.99,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model")), folder


def tiny_config(model: str, **options) -> EngineConfig:
    defaults = {
        "model": model,
        "load_format": "dummy",
        "max_num_seqs": 32,
        "num_kvcache_blocks": 256,
        "max_model_len": 256,
        "cpu_threads": 1,
    }
    return EngineConfig(**{**defaults, **options})


def run_core(core, requests: Iterable[EngineRequest], max_steps: int = 20_000) -> dict:
    """Run requests to their end; request id → (token ids, finish reason)."""
    tokens = {}
    for request in requests:
        core.add(request)
        tokens[request.request_id] = list(request.output_token_ids)
    reasons = {}
    for _ in range(max_steps):
        if not core.has_work:
            break
        for delta in core.step():
            tokens[delta.request_id] += delta.token_ids
            if delta.finish_reason is not None:
                assert delta.request_id not in reasons
                reasons[delta.request_id] = delta.finish_reason
    assert not core.has_work
    core.check_invariants()
    return {rid: (tokens[rid], reasons.get(rid)) for rid in tokens}


def request(rid: str, prompt: list[int], outputs: Iterable[int] = (), **params) -> EngineRequest:
    params = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, "seed": 0, **params}
    return EngineRequest(rid, prompt, SamplingParams(**params), output_token_ids=list(outputs))
