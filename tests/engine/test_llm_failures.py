"""The offline API when a step fails, and when there is no memory to start with."""

import pytest
import torch

from engine import LLM, ConfigError, EngineDead, SamplingParams, StepFailed
from engine.core import EngineCore
from engine.runner import build
from tests.engine.conftest import tiny_config
from tests.engine.test_core_failures import Failing, bug, lost, oom

PARAMS = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=6)
PROMPTS = [{"prompt_token_ids": [i + 1, 2, 3]} for i in range(4)]


@pytest.fixture(params=[False, True], ids=["in turn", "ahead"])
def llm(tiny_model, request):
    return LLM(
        tiny_model,
        load_format="dummy",
        num_kvcache_blocks=64,
        max_model_len=128,
        max_num_seqs=2,
        async_scheduling=request.param,
    )


def generate(llm, prompts=PROMPTS, params=PARAMS):
    return [output.tokens for output in llm.generate(prompts, params, use_tqdm=False)]


def check_idle(llm):
    llm.core.check_invariants()
    load = llm.core.load()
    assert load.free_blocks == load.total_blocks
    assert load.num_running == load.num_waiting == 0


@pytest.mark.parametrize(
    ("error", "prompts", "words"),
    [(oom, PROMPTS[:1], "max_num_batched_tokens"), (bug, PROMPTS, "division")],
)
def test_a_failed_step_is_raised_and_the_next_call_works(llm, error, prompts, words):
    wanted = generate(llm)
    with Failing(llm.core, {3: ("result", error)}):
        with pytest.raises(StepFailed, match=words):
            generate(llm, prompts)
        if llm.core.has_work:  # one step ahead, an empty one is left
            llm.core.step()
        check_idle(llm)
        assert generate(llm) == wanted
    check_idle(llm)


def test_a_step_without_memory_is_not_noticed(llm):
    wanted = generate(llm)
    with Failing(llm.core, {3: ("result", oom)}):
        assert generate(llm) == wanted
    check_idle(llm)


def test_whoever_takes_turns_is_told_or_goes_on(llm):
    wanted = generate(llm)
    streams = [llm.stream(prompt, PARAMS) for prompt in PROMPTS[:3]]
    found = [[], [], []]
    for i in (0, 1):
        found[i] += next(streams[i]).token_ids
    step = Failing(llm.core, {0: ("before", bug)})
    with step, pytest.raises(StepFailed):
        for delta in streams[0]:
            found[0] += delta.token_ids
    found[2] += [token for delta in streams[2] for token in delta.token_ids]
    with pytest.raises(StepFailed):
        for delta in streams[1]:
            found[1] += delta.token_ids
    assert found[2] == wanted[2]
    for i in (0, 1):
        assert 0 < len(found[i]) < 6
        assert found[i] == wanted[i][: len(found[i])]
    assert list(streams[0]) == list(streams[1]) == []
    assert generate(llm) == wanted
    check_idle(llm)


def test_whoever_drives_a_step_that_fails_others_goes_on(llm):
    wanted = generate(llm)
    first, second, third = (llm.stream(prompt, PARAMS) for prompt in PROMPTS[:3])
    next(first), next(second)
    with Failing(llm.core, {0: ("before", bug)}):
        assert [token for delta in third for token in delta.token_ids] == wanted[2]
    for stream in (first, second):
        with pytest.raises(StepFailed):
            list(stream)
    check_idle(llm)


def test_all_completions_of_a_prompt_are_released(llm):
    with Failing(llm.core, {2: ("before", bug)}), pytest.raises(StepFailed):
        generate(llm, PROMPTS[0], SamplingParams(n=4, ignore_eos=True, max_tokens=8))
    check_idle(llm)
    generate(llm)


def test_three_in_a_row_are_final(llm):
    with Failing(llm.core, dict.fromkeys(range(9), ("result", bug))):
        for _ in range(2):
            with pytest.raises(StepFailed):
                generate(llm, PROMPTS[0])
        with pytest.raises(EngineDead, match="build a new LLM"):
            generate(llm, PROMPTS[0])
    with pytest.raises(EngineDead, match="build a new LLM"):
        generate(llm, PROMPTS[0])


def test_a_lost_device_is_final_for_everyone(llm):
    first, second = (llm.stream(prompt, PARAMS) for prompt in PROMPTS[:2])
    next(first), next(second)
    with Failing(llm.core, {0: ("before", lost)}), pytest.raises(EngineDead, match="new process"):
        list(first)
    with pytest.raises(EngineDead):
        list(second)
    with pytest.raises(EngineDead):
        generate(llm)


# Starting


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("load_model", "weights .* smaller model"),
        ("Sampler", "max_num_seqs"),
        ("_warm_up", "gpu_memory_utilization"),
    ],
)
def test_memory_that_is_missing_at_start_names_what_to_change(
    tiny_model, monkeypatch, place, words
):
    monkeypatch.setattr(build, place, Failing.fail(oom))
    with pytest.raises(ConfigError, match=words) as caught:
        EngineCore(tiny_config(tiny_model))
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_other_errors_at_start_stay_what_they_are(tiny_model, monkeypatch):
    monkeypatch.setattr(build, "load_model", Failing.fail(lost))
    with pytest.raises(RuntimeError, match="illegal"):
        EngineCore(tiny_config(tiny_model))


def test_a_cache_that_no_machine_has_room_for(tiny_model):
    with pytest.raises(ConfigError, match="num_kvcache_blocks"):
        EngineCore(tiny_config(tiny_model, num_kvcache_blocks=2**40))
