import numpy as np
import pytest
import torch

from engine.core import EngineCore
from engine.runner import build
from engine.sampling import Sampler, logprobs, prompt_logprobs
from tests.engine.conftest import request, tiny_config
from tests.engine.sampling_reference import new_row, params, sample

torch.set_num_threads(1)
CPU = torch.device("cpu")


def check(entry, logits, token, num_top):
    """Compare one TokenLogprobs with float64 arithmetic on the raw logits [vocab]."""
    x = logits.double().numpy()
    expected = x - np.log(np.exp(x - x.max()).sum()) - x.max()
    best = np.sort(expected)[::-1][:num_top]
    assert entry.token_ids[0] == token
    assert len(entry.token_ids) == len(entry.logprobs) == 1 + num_top
    assert entry.rank == 1 + int((x > x[token]).sum())
    np.testing.assert_allclose(entry.logprobs, expected[entry.token_ids], atol=1e-5)
    np.testing.assert_allclose(entry.logprobs[1:], best, atol=1e-5)


@pytest.mark.parametrize("chunk", [1 << 24, 100])
def test_prompt_logprobs(chunk, monkeypatch):
    monkeypatch.setattr(logprobs, "LOGITS_AT_A_TIME", chunk)
    logits = torch.randn(7, 50, generator=torch.manual_seed(0)) * 3
    targets = torch.tensor([0, 49, 3, 3, 20, 11, 8])
    for num_top in (0, 1, 5, 20):
        entries = prompt_logprobs(logits, targets, num_top)
        assert len(entries) == 7
        for entry, line, target in zip(entries, logits, targets.tolist(), strict=True):
            check(entry, line, target, num_top)


def test_prompt_logprobs_of_nothing():
    assert prompt_logprobs(torch.empty(0, 9), torch.empty(0, dtype=torch.int64), 3) == []


def test_tied_tokens_share_the_best_rank():
    entry = prompt_logprobs(torch.tensor([[1.0, 2.0, 2.0, 0.0]]), torch.tensor([2]), 0)[0]
    assert entry.rank == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_get_what_they_asked_for(dtype):
    asked = [None, 0, 5, None, 2]
    logits = (torch.randn(5, 60, generator=torch.manual_seed(2)) * 2).to(dtype)
    sampler = Sampler(8, 60, CPU)
    rows = [6, 0, 3, 1, 7]
    for row, count in zip(rows, asked, strict=True):
        sampler.add_row(new_row(row, params(logprobs=count, temperature=1.2, top_k=30, seed=row)))
    output = sample(sampler, logits.clone(), rows, [4] * 5)
    entries = output.host_logprobs()
    assert set(entries) == {0, 3, 7}
    for place in (1, 2, 4):
        token = int(output.token_ids[place])
        check(entries[rows[place]], logits[place].float(), token, asked[place])


@pytest.mark.parametrize("others", [0, 1], ids=["all asked", "some asked"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logprobs_are_of_the_raw_distribution(others, temperature):
    logits = torch.randn(2 + others, 40, generator=torch.manual_seed(5))
    sampler = Sampler(3, 40, CPU, [1])
    edits = {"logit_bias": {4: 50.0}, "repetition_penalty": 3.0, "min_tokens": 2}
    for row in range(2):
        fields = {"temperature": temperature, "logprobs": 3, "min_p": 0.1, **edits}
        sampler.add_row(new_row(row, params(**fields), [1, 2, 3]))
    sampler.add_row(new_row(2, params()))
    rows = list(range(2 + others))
    entries = sample(sampler, logits.clone(), rows, [3] * len(rows)).host_logprobs()
    assert set(entries) == {0, 1}
    for row in range(2):
        check(entries[row], logits[row], 4, 3)


def test_nobody_asked():
    sampler = Sampler(1, 10, CPU)
    sampler.add_row(new_row(0, params()))
    output = sample(sampler, torch.zeros(1, 10), [0], [0])
    assert output.logprobs is None
    assert output.host_logprobs() == {}


@pytest.fixture
def gathered(monkeypatch):
    """Shapes of the float32 logits that log-probabilities were computed of together."""
    shapes, gather = [], logprobs._gather

    def spy(logits, *others):
        assert logits.dtype == torch.float32
        shapes.append(tuple(logits.shape))
        return gather(logits, *others)

    monkeypatch.setattr(logprobs, "_gather", spy)
    return shapes


@pytest.mark.parametrize("edits", [{}, {"logit_bias": {4: 9.0}}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_batches_are_worked_on_in_parts(monkeypatch, gathered, dtype, edits):
    logits = (torch.randn(9, 60, generator=torch.manual_seed(2)) * 2).to(dtype)
    sampler = Sampler(9, 60, CPU)
    for row in range(9):
        asked = None if row == 5 else row % 4
        sampler.add_row(new_row(row, params(logprobs=asked, seed=row, **edits)))
    rows = [*range(9)]
    whole = sample(sampler, logits.clone(), rows, rows).host_logprobs()
    monkeypatch.setattr(logprobs, "LOGITS_AT_A_TIME", 3 * 60 + 59)
    assert sample(sampler, logits.clone(), rows, rows).host_logprobs() == whole
    assert gathered == [(8, 60), (3, 60), (3, 60), (2, 60)]
    for row, entry in whole.items():
        check(entry, logits[row].float(), entry.token_ids[0], row % 4)


def test_one_row_is_the_least(monkeypatch, gathered):
    monkeypatch.setattr(logprobs, "LOGITS_AT_A_TIME", 7)
    prompt_logprobs(torch.randn(3, 50), torch.tensor([1, 2, 3]), 2)
    assert gathered == [(1, 50)] * 3


def test_logits_of_a_prompt_exist_in_parts(tiny_model, monkeypatch, gathered):
    core = EngineCore(tiny_config(tiny_model, max_num_batched_tokens=32))
    wire = request("r", [*range(3, 103)], max_tokens=2, prompt_logprobs=2, logprobs=1)
    rows, compute = [], core.runner.model.compute_logits

    def spy(hidden):
        rows.append(len(hidden))
        return compute(hidden)

    monkeypatch.setattr(core.runner.model, "compute_logits", spy)
    found = []
    for most in (logprobs.LOGITS_AT_A_TIME, 10 * 300):
        rows.clear()
        gathered.clear()
        monkeypatch.setattr(logprobs, "LOGITS_AT_A_TIME", most)
        core.add(wire)
        deltas = []
        while core.has_work:
            deltas += core.step()
        found.append([e for delta in deltas for e in delta.prompt_logprobs or ()])
    assert [entry.token_ids for entry in found[0]] == [entry.token_ids for entry in found[1]]
    assert [entry.token_ids[0] for entry in found[1]] == wire.prompt_token_ids[1:]
    assert rows[:4] == [10, 10, 10, 2]
    assert max(count for count, _ in gathered) == max(rows) == 10


def test_the_largest_step_of_the_start_wants_log_probabilities_of_all_rows(tiny_model, gathered):
    core = EngineCore(tiny_config(tiny_model, max_num_seqs=6))
    gathered.clear()
    build._run_largest_step(core.runner, 6, 64, 64)
    assert gathered == [(6, 300)]
