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
    assert all(w.name in WORKLOADS for suite in SUITES.values() for w in suite.workloads)
    assert [EngineSpec.parse(label) for suite in SUITES.values() for label in suite.engines]


def test_the_mixed_workload_has_the_totals_that_peers_were_measured_with():
    requests = WORKLOADS["256x100..1024-100..1024"].draw(VOCAB_SIZE, seed=4)
    assert requests.output_tokens == 144_976
    assert requests.input_tokens == 144_312


def test_batching_modes_serve_the_same_requests_in_other_portions():
    continuous, static, single = (
        WORKLOADS[f"{n}x128..512-32..256-{mode}"].draw(VOCAB_SIZE, seed=0)
        for mode, n in (("continuous", 48), ("static", 48), ("single", 8))
    )
    assert continuous.outputs == static.outputs
    assert continuous.outputs[:8] == single.outputs
    assert continuous.batches(20) == [continuous]
    assert [len(part.prompts) for part in static.batches(20)] == [20, 20, 8]
    assert [len(part.prompts) for part in single.batches(20)] == [1] * 8
    assert [size for part in static.batches(20) for size in part.outputs] == static.outputs


def test_a_warm_up_is_cut_short():
    requests = WORKLOADS["1000x128..512-256"].draw(VOCAB_SIZE, seed=0)
    warm_up = requests.first(requests=32, output_tokens=4)
    assert warm_up.prompts == requests.prompts[:32]
    assert warm_up.outputs == [4] * 32


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
