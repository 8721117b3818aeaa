"""The server with fake engines, as `benchmarks.serving run --fake` starts it."""

from __future__ import annotations

import json

import pytest

from benchmarks.serving.__main__ import main

pytestmark = pytest.mark.integration


def test_every_token_of_a_fake_engine_is_accounted_for(tmp_path):
    out = tmp_path / "out.json"
    fake = ["--fake", "step-ms=5", "engines=2", "max-num-seqs=4"]
    load = ["--clients", "6", "--requests", "24", "--input", "4", "8", "--output", "20", "40"]
    main(["run", *fake, *load, "--turns", "2", "--out", str(out)])
    document = json.loads(out.read_text())
    (record,) = document["records"]
    assert record["completed"] == record["requests"] == 48
    assert (record["wrong"], record["not_in_journal"], record["short"]) == (0, 0, 0)
    assert record["delay_ms"]["p50"] > 0
    assert record["cpu_s"]["ingress"] > 0 and record["cpu_s"]["engine_actor"] > 0
    assert record["offered_tok_s"] == 1200
    assert document["server"]["engines"] == 2


def test_a_fake_server_that_cannot_start_says_why(tmp_path):
    with pytest.raises(SystemExit, match="did not start"):
        main(["run", "--fake", "step-ms=soon", "--out", str(tmp_path / "out.json")])
