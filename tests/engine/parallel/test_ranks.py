"""Ranks that are processes, as users start them."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import ConfigError, EngineDead, RankLost
from engine.llm import LLM
from engine.parallel.meeting import Meeting
from engine.parallel.messages import Masks, decode, encode_masks, encode_plan
from engine.parallel.processes import RankProcesses
from engine.sampling.token_masks import TokenMasks
from engine.sampling_params import SamplingParams
from engine.step import NewRow, StepPlan
from engine.structured_outputs.params import StructuredOutputsParams

PROMPTS = [{"prompt_token_ids": list(range(1, n))} for n in (3, 40, 100)]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=30, logprobs=2),
    SamplingParams(temperature=1.0, seed=5, max_tokens=30, top_p=0.9),
    SamplingParams(temperature=0, max_tokens=30, repetition_penalty=1.3, prompt_logprobs=1),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sizes = {"vocab_size": 131, "hidden_size": 64, "intermediate_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("model")
    config = Qwen2Config(**sizes, **heads, max_position_embeddings=256, initializer_range=0.2)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def start(folder, size: int, **options) -> LLM:
    cache = {"kv_cache_memory_bytes": 1 << 22, "max_num_batched_tokens": 64}
    return LLM(
        str(folder), device="cpu", cpu_threads=1, tensor_parallel_size=size, **cache, **options
    )


def tokens(llm: LLM) -> list[list[int]]:
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def test_two_ranks_give_the_tokens_of_one_and_die_together(folder, tmp_path, monkeypatch):
    (tmp_path / "queue.py").write_text("raise SystemExit('imported from the working folder')")
    monkeypatch.chdir(tmp_path)
    wanted = tokens(start(folder, 1))
    llm = start(folder, 2, async_scheduling=True)
    assert tokens(llm) == wanted == tokens(llm)
    (link,) = llm.core.runner._links._links
    link.send_bytes(encode_plan(StepPlan(0, rows=[10**6])))  # which the other rank cannot do
    with pytest.raises(EngineDead) as dead:
        while True:
            tokens(llm)
    assert isinstance(dead.value.__cause__, RankLost)


def test_a_rank_that_cannot_start_says_why(folder, monkeypatch):
    class Misled(RankProcesses):
        def __init__(self, meeting: Meeting) -> None:
            config = meeting.config.model_copy(update={"max_model_len": 10**6})
            meeting._config.write_text(config.model_dump_json())
            super().__init__(meeting)

    monkeypatch.setattr("engine.parallel.leading.RankProcesses", Misled)
    with pytest.raises(ConfigError, match=r"cannot start.*max_model_len"):
        start(folder, 2)


def test_sizes_that_do_not_fit_are_refused_before_long(folder):
    with pytest.raises(ConfigError, match="tensor_parallel_size is 3"):
        EngineCore(EngineConfig(model=str(folder), device="cpu", tensor_parallel_size=3))


def test_plans_and_masks_cross():
    form = StructuredOutputsParams(choice=["a", "b"])
    params = SamplingParams(stop=["x"], logit_bias={3: 1.5}, structured_outputs=form)
    plan = StepPlan(
        7,
        rows=[2, 0],
        starts=[5, 0],
        num_tokens=[1, 3],
        samples=[True, False],
        input_ids={0: [1, 2, 3]},
        new_rows=[NewRow(0, "r", params, [1, 2, 3], 3)],
        new_blocks={0: (0, [4, 5])},
        masked=[0],
    )
    assert decode(encode_plan(plan)) == plan
    masks = TokenMasks.allocate([0, 2], 131)
    masks.bits.fill_(5)
    found = decode(encode_masks(masks))
    assert isinstance(found, Masks)
    restored = found.restore(pin_memory=False)
    assert restored.places == masks.places
    assert torch.equal(restored.packed, masks.packed)
    assert decode(encode_masks(None)) is None
