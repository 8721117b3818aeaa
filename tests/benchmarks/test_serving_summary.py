from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from benchmarks.serving.answers import Answer, Run
from benchmarks.serving.journal import Journal
from benchmarks.serving.processes import read_cpu
from benchmarks.serving.summary import spread, summarise, summarise_fake, table


def answer(sent=0.0, times=(1.0, 1.5, 2.5), request_id="r"):
    words = [" a", " b", " a"]
    return Answer(
        " a b",
        len(times),
        sent,
        request_id,
        list(zip(times, words, strict=False)),
        prompt_tokens=2,
        output_tokens=len(times),
    )


def test_spread_takes_the_nearest_rank():
    figures = spread([0.001 * i for i in range(100, 0, -1)])
    assert figures == {"mean": 50.5, "p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0}
    assert spread([]) is None


def test_summary_of_one_answer():
    record = summarise(Run([answer(sent=0.5)], begin=0.0, end=3.0))
    assert record["output_tok_s"] == 1.0
    assert (record["input_tokens"], record["output_tokens"]) == (2, 3)
    assert record["ttft_ms"]["p50"] == 500.0
    assert (record["itl_ms"]["p50"], record["itl_ms"]["max"]) == (500.0, 1000.0)
    assert record["tpot_ms"]["p50"] == 750.0
    assert record["e2e_ms"]["p50"] == 2000.0
    assert record["steady_tok_s"] is None


def test_failures_are_counted_by_kind_and_in_no_latency():
    failed = [Answer("", 3, 0.0, error="HTTP 429: full") for _ in range(2)]
    short = answer()
    short.asked_tokens = 9
    record = summarise(Run([*failed, Answer("", 3, 0.0), short], 0.0, 3.0))
    assert record["errors"] == {"HTTP 429: full": 2, "no text": 1}
    assert (record["requests"], record["completed"], record["short"]) == (4, 1, 1)
    assert record["ttft_ms"]["max"] == 1000.0


def test_steady_speed_counts_while_all_have_work():
    run = Run([answer(), answer(times=(2.0, 3.0, 9.0))], 0.0, 9.0, full=(1.0, 3.0))
    assert summarise(run)["steady_tok_s"] == 2.0  # at 1.5, 2.5, 2.0 and 3.0


def test_delay_runs_from_the_engines_step_for_each_token(tmp_path):
    (tmp_path / "engine-1.journal").write_text("0.9 0.1 r:0\n1.4 0.1\n1.5 0.1\n")
    whole = Answer(" a b", 3, 0.0, "r", [(1.0, " a"), (1.7, " b a")], 2, 3)
    record = summarise_fake(Run([whole], 0.0, 2.0), Journal(tmp_path), by_token=True)
    delays = record["delay_ms"]
    assert (delays["p50"], delays["max"]) == (200.0, 300.0)
    assert delays["mean"] == 200.0  # 100, 300 and 200
    assert (record["wrong"], record["not_in_journal"]) == (0, 0)
    assert record["step_ms"]["max"] == 500.0


def test_a_wrong_text_is_counted(tmp_path):
    wrong = Answer(" a b", 2, 0.0, "r", [(1.0, " b a")], 2, 2)
    record = summarise_fake(Run([wrong, answer()], 0.0, 2.0), Journal(tmp_path), by_token=True)
    assert (record["wrong"], record["not_in_journal"]) == (1, 1)


def test_table_has_a_cell_for_each_head():
    record = summarise(Run([answer()], 0.0, 3.0)) | {
        "load": "1 client",
        "disturbance": None,
        "cpu_us_per_token": {
            "ingress": 1.0,
            "engine_actor": 6.0,
            "engine_core": 4.0,
            "engine_replica": 0.5,
        },
    }
    head, line, row = table([record]).split("\n")
    assert head.count("|") == line.count("|") == row.count("|")
    assert "| 3.5 |" in row


def test_cpu_time_goes_to_the_role_that_the_title_says():
    burn = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    before = read_cpu(os.getpid())["others"] - time.process_time()  # children of other tests
    titles = ("ray::ServeReplica:app:Ingress.x", "ray::EngineActor.step", "python")
    children = [
        subprocess.Popen(
            [title, "-c", burn],
            executable=sys.executable,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for title in titles
    ]
    try:
        for child in children:
            child.stdout.readline()
        spent = read_cpu(children[0].pid)
        assert spent["ingress"] >= 0.25
        assert spent["engine_actor"] == spent["others"] == 0.0
        spent = read_cpu(os.getpid())
    finally:
        for child in children:
            child.communicate(b"\n")
    assert spent["ingress"] >= 0.25 and spent["engine_actor"] >= 0.25
    assert spent["others"] == pytest.approx(before + 0.3 + time.process_time(), abs=0.3)
