"""Step times, lengths and arrivals, and the histogram that all figures go through."""

from __future__ import annotations

import json
import random
from itertools import islice

import pytest

from benchmarks import results
from cluster.simulate import __main__ as command
from cluster.simulate import choices
from cluster.simulate.step_time import StepTime, errors, fit
from cluster.simulate.tally import Histogram
from cluster.simulate.traces import TRACES

PACE = StepTime(0.004, 1e-5, 2e-5, 1e-8)


def test_stretch_of_steps_is_their_sum_and_can_be_undone():
    rows, context = 30, 20_000
    single = [PACE.step(rows, context + rows * i) for i in range(200)]
    for steps in (1, 2, 77, 200):
        whole = PACE.decode(rows, context, steps)
        assert whole == pytest.approx(sum(single[:steps]))
        assert PACE.decoded(rows, context, whole) == steps
        assert PACE.decoded(rows, context, whole - 1e-6) == steps - 1


def sweep_of(pace: StepTime) -> dict:
    sizes = [(batch, batch * context) for batch in (1, 16, 256) for context in (100, 4000)]
    return {
        "records": [
            {"batch": rows, "context_tokens": context, "step_and_idle_s": pace.step(rows, context)}
            for rows, context in sizes
        ]
    }


def offline_of(pace: StepTime) -> dict:
    tokens = 10 * 16384
    seconds = 10 * pace.fixed_s + tokens * pace.prefill_token_s
    median = {"prefill_tok_s": tokens / seconds}
    first = {"requests": 160, "input_tokens": tokens, "output_tokens": 160, "median": median}
    return {"records": [first, {**first, "output_tokens": 9000}]}


def test_fit_finds_the_pace_that_was_measured():
    found = fit(sweep_of(PACE), offline_of(PACE), 256)
    for name in StepTime.__slots__:
        assert getattr(found, name) == pytest.approx(getattr(PACE, name), rel=1e-6)
    with pytest.raises(ValueError, match="three batches"):
        fit(sweep_of(PACE), offline_of(PACE), 1)
    with pytest.raises(ValueError, match="one token"):
        fit(sweep_of(PACE), {"records": []}, 256)


def test_fit_to_the_measured_h200_is_close_at_every_batch():
    sweep, offline = results.read(command._SWEEP), results.read(command._OFFLINE)
    found = fit(sweep, offline, 256)
    assert max(map(abs, errors(found, sweep, 256))) < 0.08


def test_quantiles_are_right_within_a_bucket():
    rng, histogram, halves = random.Random(0), Histogram(), [Histogram(), Histogram()]
    times = [rng.lognormvariate(-3, 1) for _ in range(5000)]
    for number, seconds in enumerate(times):
        histogram.add(seconds)
        halves[number % 2].add(seconds)
    halves[0].merge(halves[1])
    for share in (0.01, 0.5, 0.95, 0.99, 1.0):
        true = sorted(times)[max(0, -(-int(share * 5000) // 1) - 1)]
        assert histogram.quantile(share) == pytest.approx(true, rel=0.006)
        assert halves[0].quantile(share) == histogram.quantile(share)
    assert histogram.mean == pytest.approx(sum(times) / 5000)


@pytest.mark.parametrize("trace", TRACES)
def test_chats_arrive_at_the_rate_asked_for(trace):
    chats = list(TRACES[trace].chats(0, 12_000, 10.0, 3, 32768))
    begins = [begin for begin, _ in chats]
    assert begins == sorted(begins)
    assert sum(len(chat.turns) for _, chat in chats) == 12_000
    assert 12_000 / begins[-1] == pytest.approx(10.0, rel=0.1)


def test_bursts_come_to_all_cells_at_once():
    ends = []
    for cell in range(2):
        times = [begin for begin, _ in TRACES["bursts"].chats(cell, 3000, 20.0, 0, 32768)]
        crowds = [a for a, b in zip(times, islice(times, 20, None), strict=False) if b - a < 0.2]
        ends.append({round(crowd) for crowd in crowds})
    assert ends[0] & ends[1]


def test_prefixes_are_shared_by_the_chats_that_begin_alike():
    chats = [chat for _, chat in TRACES["chats"].chats(0, 400, 10.0, 0, 32768)]
    names = [chat.blocks(128, 2048) for chat in chats]
    firsts = {name[0] for name in names}
    assert 2 < len(firsts) <= 64
    assert len({name[8] for name in names}) == len(chats)
    assert chats[0].blocks(128, 300) == names[0][:2]


def test_command_writes_a_file_with_seed_and_figures_and_draws_it(tmp_path, capsys):
    out = tmp_path / "run.json"
    words = (
        f"run --engines 4 --cell 2 --requests 60 --traces chats --seed 5 --workers 1 --out {out}"
    )
    command.main(words.split())
    document = json.loads(out.read_text())
    assert document["seed"] == 5
    assert document["command"].endswith(f"--out {out}")
    assert [record["policy"] for record in document["records"]] == [
        "prefix_load",
        "round_robin",
        "power_of_two",
    ]
    assert all(record["requests"] == 60 for record in document["records"])
    pytest.importorskip("matplotlib")
    command.main(["plot", str(out), "--images", str(tmp_path)])
    assert (tmp_path / "run.png").stat().st_size > 10_000


def test_more_engines_take_longer_to_choose_from(monkeypatch):
    monkeypatch.setattr(choices, "_TIMED_S", 0.0)
    records = list(choices.measure([2, 3], 0))
    assert [record["engines"] for record in records] == [2, 3] * 3
    assert all(record["choice_us"] > 0 for record in records)
