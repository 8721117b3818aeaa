"""The load that is served and the one that is simulated are the same."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager

import pytest

from benchmarks.serving.answers import Answer
from benchmarks.serving.conversations import Mix, arrivals, count_words
from cluster.simulate import __main__ as command
from cluster.simulate import check
from cluster.simulate.ingress import Wires
from tests.benchmarks.test_serving_run import served

FAKE = {
    "step_ms": 20.0,
    "token_us": 60.0,
    "max_num_seqs": 1024,
    "max_num_batched_tokens": 2048,
    "cache_tokens": 40960,
    "block_size": 16,
    "engines": 4,
    "ingresses": 1,
    "routing_policy": "prefix_load",
}


@pytest.mark.parametrize("rate", [16.0, None])
def test_simulated_chats_are_those_that_are_sent(rate):
    case = check.Case("case", Mix((60, 400), (20, 60), turns=3, think_s=2.0), 20, rate)
    times = arrivals(rate, 1, 7) if rate else iter(lambda: 0.0, None)
    chats = list(case.chats(7))
    assert len(chats) == 20
    for begins, (_, chat), conversation in zip(times, chats, case.mix.draw(7), strict=False):
        assert chats[0][0] == begins or chat is not chats[0][1]
        assert [turn.said for turn in chat.turns] == [
            count_words(turn.text) for turn in conversation.turns
        ]
        assert [turn.pause_s for turn in chat.turns] == [t.pause_s for t in conversation.turns]


def test_prediction_is_a_step_and_the_plane_where_nothing_waits():
    case = check.Case("idle", Mix((300, 300), (8, 8)), 50, 0.1)
    predicted = check._predict(case, FAKE, Wires(0.003, 0.004), 0)
    assert predicted["ttft_ms"]["p50"] == pytest.approx(20 + 300 * 0.06 + 7, rel=0.01)
    assert predicted["itl_ms"]["p50"] == pytest.approx(20, rel=0.01)


def test_command_writes_what_was_predicted_and_what_came(tmp_path, monkeypatch):
    @contextmanager
    def serve_stub(settings, log):
        with served() as at:
            url = f"http://{at.host}:{at.port}"
            yield {**FAKE, "url": url, "model": at.model, "pid": os.getpid()}

    loads = [
        check.Case("poisson", Mix((5, 9), (2, 4)), 6, 100.0),
        check.Case("chats", Mix((5, 9), (2, 4), turns=2, think_s=0.01), 3, None),
    ]
    monkeypatch.setattr(check, "serve_fake", serve_stub)
    monkeypatch.setattr(check, "cases", lambda options: loads)
    out = tmp_path / "check.json"
    command.main(["check", "--out", str(out)])
    document = json.loads(out.read_text())
    assert [record["load"] for record in document["records"]] == ["poisson", "chats"]
    for record in document["records"]:
        predicted, measured = (record[side]["ttft_ms"] for side in ("predicted", "measured"))
        assert record["plane_ms"] >= 0
        assert predicted["p50"] >= FAKE["step_ms"]
        error = predicted["p50"] / measured["p50"] - 1
        assert record["errors"]["p50"] == pytest.approx(error, abs=1e-4)


def test_failed_request_spoils_the_check():
    answer = Answer(" a", 1, 0.0, error="HTTP 503")
    with pytest.raises(RuntimeError, match="1 of 1 requests failed: HTTP 503"):
        check._good([answer])


def test_table_tells_error_and_verdict():
    side = {"ttft_ms": {"p50": 100.0, "p95": 200.0}}
    errors = {"p50": 0.0, "p95": -0.25}
    record = {"load": "x", "predicted": side, "measured": side, "errors": errors, "holds": False}
    assert check.table([record]).splitlines()[-1].endswith("| -25.0% | no |")
