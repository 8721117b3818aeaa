"""Log-probabilities of prompts and outputs are transformers' within 1e-4, in float32."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine import LLM, SamplingParams
from engine.config import BUNDLED_MODEL
from engine.model_source import resolve_model
from tests.engine.test_models import family  # noqa: F401  # a fixture

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "greedy.json").read_text())["rows"]
TOLERANCE = 1e-4
TOP = 5
WAYS = {"batch": {}, "chunked": {"max_num_batched_tokens": 32}, "one row": {"max_num_seqs": 1}}
DRAWN = {"temperature": 1.0, "top_k": 40, "repetition_penalty": 1.3}


@torch.inference_mode()
def check(reference, output):
    """Compare every position of prompt and output with one forward pass over both."""
    prompt, completion = output.prompt_token_ids, output.outputs[0]
    tokens = [*prompt, *completion.token_ids]
    logits = reference(torch.tensor([tokens])).logits[0, :-1].float()
    wanted = torch.log_softmax(logits, -1)
    first, *given = [*output.prompt_logprobs, *completion.logprobs]
    assert first is None
    assert len(given) == len(tokens) - 1
    for entry, row, token in zip(given, wanted, tokens[1:], strict=True):
        assert token in entry
        assert len(entry) in (TOP, TOP + 1)
        for other, found in entry.items():
            assert found.logprob == pytest.approx(row[other].item(), abs=TOLERANCE)
            assert found.rank - 1 <= (row > row[other] - TOLERANCE).sum()
        best = sorted((found.logprob for found in entry.values()), reverse=True)[:TOP]
        assert best == pytest.approx(row.topk(TOP).values.tolist(), abs=TOLERANCE)


def run(llm, prompts, max_tokens, **options):
    params = [
        SamplingParams(
            **{"temperature": 0.0, **options},
            max_tokens=max_tokens,
            ignore_eos=True,
            seed=seed,
            logprobs=TOP,
            prompt_logprobs=TOP,
        )
        for seed in range(len(prompts))
    ]
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(asked, params, use_tqdm=False)


@pytest.mark.parametrize("options", [{}, DRAWN], ids=["greedy", "drawn"])
def test_every_family(family, options):  # noqa: F811
    reference, folder = family
    llm = LLM(str(folder), max_num_batched_tokens=32, num_kvcache_blocks=64, cpu_threads=1)
    prompts = [[(7 * i + j * j) % 128 for j in range(length)] for i, length in enumerate((2, 40))]
    for output in run(llm, prompts, 12, **options):
        check(reference, output)


@pytest.fixture(scope="module")
def smollm2():
    source = resolve_model(BUNDLED_MODEL)
    return AutoModelForCausalLM.from_pretrained(
        source.path.parent, gguf_file=source.path.name, dtype=torch.float32
    ).eval()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("way", WAYS)
def test_the_bundled_model(smollm2, way, options):
    llm = LLM(BUNDLED_MODEL, dtype="float32", num_kvcache_blocks=1024, **WAYS[way])
    prompts = [row["prompt"] for row in GOLDEN[::8] if 1 < len(row["prompt"]) < 500]
    for output in run(llm, prompts, 24, **options):
        check(smollm2, output)
