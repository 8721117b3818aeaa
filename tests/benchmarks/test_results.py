import json

import pytest

from benchmarks import offline, results
from benchmarks.engines import Engine, RequestTimes
from benchmarks.latency import latency_table
from benchmarks.worker import measure
from benchmarks.workloads import WORKLOADS


class FakeEngine(Engine):
    """Counts up from the last token of each prompt."""

    vocab_size = 500

    def __init__(self, short=0):
        self.short = short
        self.runs = []

    def run(self, requests):
        self.runs.append(requests)
        pairs = zip(requests.prompts, requests.outputs, strict=True)
        return [[prompt[-1]] * (size - self.short) for prompt, size in pairs]


def line(engine, seconds, seed=0, digests=(1, 2)):
    return {
        "engine": engine,
        "workload": "w",
        "requests": 2,
        "input_tokens": 100,
        "output_tokens": 42,
        "seconds": seconds,
        "prefill_seconds": 1.0,
        "digests": list(digests),
        "disturbance": 0.25,
        "seed": seed,
    }


def test_medians_split_prefill_from_decode():
    (record,) = results.summarise([line("a", s, seed) for seed, s in enumerate((9.0, 5.0, 3.0))])
    assert record["median"] == {"output_tok_s": 8.4, "prefill_tok_s": 100.0, "decode_tok_s": 10.0}
    assert record["seconds"] == [9.0, 5.0, 3.0]


def test_a_run_of_one_token_has_no_decode_speed():
    (record,) = results.summarise([line("a", 1.0)])
    assert record["median"]["decode_tok_s"] is None


def test_the_table_tells_ratios_and_equal_outputs():
    records = results.summarise([line("ours", 2.0), line("theirs", 4.0, digests=(1, 3))])
    table = results.compare([{"records": records}], "ours")
    ours, theirs = table.splitlines()[2:]
    assert "ours is" in table
    assert "2.00 x" in theirs and "1 of 2" in theirs and "25%" in theirs
    assert "x |" not in ours


def test_a_file_is_read_back_as_it_was_written(tmp_path):
    document = {"command": "c", "records": results.summarise([line("a", 2.0), line("b", 3.0)])}
    results.write(document, tmp_path / "deep" / "r.json")
    assert results.read(tmp_path / "deep" / "r.json") == document


def test_measuring_counts_what_was_made():
    measured = measure(FakeEngine(), WORKLOADS["4x128-48"], seed=3)
    assert measured["output_tokens"] == 192
    assert measured["input_tokens"] == 512
    assert len(set(measured["digests"])) == 4
    assert measured["disturbance"] >= 0
    json.dumps(measured)


def test_an_engine_that_stops_early_is_caught():
    with pytest.raises(RuntimeError, match="tokens, not"):
        measure(FakeEngine(short=1), WORKLOADS["4x128-48"], seed=3)


def test_a_missing_model_ends_with_a_sentence(tmp_path):
    missing = str(tmp_path / "nothing")
    with pytest.raises(SystemExit, match="there is no model directory"):
        offline.main(["run", "--engines", "transformers", "--model", missing])


def test_comparing_prints_the_files_named(tmp_path, capsys):
    file = tmp_path / "r.json"
    records = results.summarise([line("trunkline", 2.0), line("b", 5.0)])
    results.write({"machine": {}, "engines": {}, "records": records}, file)
    offline.main(["compare", str(file)])
    assert "2.50 x" in capsys.readouterr().out


def test_prefill_alone_is_measured_only_when_asked_for():
    engine = FakeEngine()
    measured = measure(engine, WORKLOADS["4x128-48"], seed=0, prefill=False)
    assert measured["prefill_seconds"] is None
    assert [requests.output_tokens for requests in engine.runs] == [4 * 4, 4 * 48]
    record = results.summarise([{"engine": "a", "workload": "w", **measured}])[0]
    assert record["median"]["prefill_tok_s"] is None
    assert record["median"]["output_tok_s"] > 0


def test_a_workload_of_first_tokens_tells_the_speed_of_prefill():
    alone = line("a", 2.0) | {"prefill_seconds": None, "output_tokens": 2}
    (record,) = results.summarise([alone])
    assert record["median"]["prefill_tok_s"] == 50.0


def test_request_times_become_latencies():
    engine = FakeEngine()
    engine.request_times = [RequestTimes(float(i), 2.0 * i) for i in range(1, 101)]
    measured = measure(engine, WORKLOADS["4x128-48"], seed=0)
    assert measured["latency"]["first_token"] == {"mean": 50.5, "p50": 50.0, "p99": 99.0}
    assert measured["latency"]["finished"]["p99"] == 198.0
    records = results.summarise([{"engine": "a", "workload": "w", **measured}])
    assert "| w | a | 50.500 | 50.000 | 99.000 | 101.000 | 100.000 | 198.000 |" in latency_table(
        records
    )
