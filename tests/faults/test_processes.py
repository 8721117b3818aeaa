"""Processes that are killed or stopped under load, on a real Ray cluster: no stream is lost."""

from __future__ import annotations

import pytest

from benchmarks.serving.failover import FAULTS, measure, parse, settings
from benchmarks.serving.fake_server import serve_fake

pytestmark = pytest.mark.faults

LONGEST_PAUSE_S = {"SIGKILL": 8.0, "SIGSTOP": 10.0}
"""Of any stream. The machine also starts new engines; a silent one is given up after 8 s, and what
moves from there must not move to another that has been stopped."""


@pytest.mark.parametrize("fault", FAULTS)
def test_no_stream_is_lost_and_every_text_is_right(fault, tmp_path):
    words = ["--streams", "60", "--requests", "150", "--every", "4", "--output", "200", "400"]
    with serve_fake(settings(fault), tmp_path / "server.log") as fake:
        found = measure(fake, parse(words), fault)
    assert found["requests"] == 150 and found["hits"] >= 3
    assert (found["errors"], found["wrong"]) == ({}, 0)
    assert found["pause_s"]["max"] < LONGEST_PAUSE_S[fault.partition(":")[2]]
