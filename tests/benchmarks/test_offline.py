"""The whole way, from the command line over an engine in a process of its own to the file."""

import json

import pytest

from benchmarks import offline, results
from benchmarks.workloads import SUITES
from engine import LLM
from tests.engine.conftest import TINY_LLAMA

PROFILES = hasattr(LLM, "start_profile")


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))
    return str(tmp_path)


def run(model, words, out):
    words = f"run --model {model} --load-format dummy --out {out} {words}".split()
    offline.main(words)
    return results.read(out)


def test_a_run_tells_what_it_was_made_with(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BENCH_COMMIT", "0123abc")
    words = "--workloads 4x128-48 --engines trunkline:cpu_threads=1 --rounds 1 --no-prefill"
    document = run(model, words + (" --profile" if PROFILES else ""), tmp_path / "r.json")
    assert document["commit"] == "0123abc"
    assert {"command", "started", "machine", "model", "load_format"} <= document.keys()
    loaded = document["engines"]["trunkline:cpu_threads=1"]
    assert loaded["first_token_seconds"] > loaded["load_seconds"] > 0
    assert loaded["first_token_seconds"] > sum(loaded["settled"]["startup_seconds"].values())
    assert loaded["options"] == {"cpu_threads": 1}
    assert loaded["warm_up"] == {"requests": 32, "output_tokens": 4}
    (record,) = document["records"]
    assert record["seeds"] == [0]
    assert record["median"]["output_tok_s"] > 0
    assert record["median"]["prefill_tok_s"] is None
    printed = capsys.readouterr().out
    assert "4x128-48" in printed
    if PROFILES:
        assert record["profile"]["decode"]["steps"] >= 47
        assert "| decode |" in printed


def test_a_suite_settles_what_the_command_line_leaves_open(model):
    options = offline._parse(["run", "--suite", "s2", "--model", "qwen2.5-7b"])
    offline._fill_in(options, SUITES["s2"])
    assert [label.partition(",")[0] for label in options.engines] == [
        "trunkline:scheduling_policy=fcfs",
        "trunkline:scheduling_policy=sjf",
    ]
    assert (options.load_format, options.rounds, options.prefill) == ("dummy", 1, False)
    assert options.profile == []
    options = offline._parse(["run", "--model", model, "--workloads", "4x128-48", "--profile"])
    offline._fill_in(options, SUITES["cpu"])
    assert (options.load_format, options.rounds, options.prefill) == ("auto", 3, True)
    assert options.profile == ["4x128-48"]
