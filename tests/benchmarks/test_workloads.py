from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.engines import ENGINES, EngineSpec
from benchmarks.workloads import FIRST_TOKEN, SUITES, WORKLOADS

VOCAB_SIZE = 1000


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=lambda w: w.name)
def test_requests_have_the_lengths_of_the_workload(workload):
    requests = workload.draw(VOCAB_SIZE, seed=0)
    assert len(requests.prompts) == len(requests.outputs) == workload.requests
    low, high = workload.prompt_tokens
    assert all(low <= len(prompt) <= high for prompt in requests.prompts)
    low, high = workload.output_tokens
    assert all(low <= size <= high for size in requests.outputs)
    assert all(FIRST_TOKEN <= t < VOCAB_SIZE for prompt in requests.prompts for t in prompt)


def test_a_seed_draws_the_same_requests_again_and_other_seeds_other_tokens():
    mixed = WORKLOADS["32x16..512-8..256"]
    first, again, other = (mixed.draw(VOCAB_SIZE, seed) for seed in (1, 1, 2))
    assert first == again
    assert first.prompts != other.prompts
    assert first.outputs == other.outputs
    assert first.input_tokens == other.input_tokens


def test_prefill_alone_keeps_the_prompts():
    requests = WORKLOADS["4x128-48"].draw(VOCAB_SIZE, 0)
    prefill = requests.first_token_only()
    assert prefill.prompts == requests.prompts
    assert prefill.output_tokens == 4
    assert requests.output_tokens == 4 * 48


def test_suites_name_workloads():
    assert all(name in WORKLOADS for names in SUITES.values() for name in names)


def test_engine_options_are_read_from_the_label():
    spec = EngineSpec.parse("transformers:batch_size=8,attn_implementation=eager")
    assert spec.name == "transformers"
    assert spec.options == {"batch_size": 8, "attn_implementation": "eager"}
    assert EngineSpec.parse("trunkline").options == {}


@pytest.mark.parametrize("label", ["nothing", "transformers:batch_size", ""])
def test_a_wrong_label_is_refused(label):
    with pytest.raises(ValueError, match=r"must be written as|unknown engine"):
        EngineSpec.parse(label)


def test_every_engine_has_an_adapter_file():
    for home in ENGINES.values():
        module, _, name = home.partition(":")
        found = find_spec(module)
        assert found is not None
        assert f"class {name}" in Path(found.origin).read_text()
