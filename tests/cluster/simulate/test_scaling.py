"""The policy that serves, and Serve's own rule, over simulated engines."""

from __future__ import annotations

import json
import random

import pytest

from cluster.autoscaling import Goals, Observation
from cluster.simulate import __main__ as command
from cluster.simulate import scaling
from cluster.simulate.cell import Cell, CellSettings, Sizing
from cluster.simulate.engine import EngineShape
from cluster.simulate.serve_rule import ByRequests
from cluster.simulate.step_time import StepTime
from cluster.simulate.traces import TRACES, Steps
from deployments.load_meter import EngineUse

SLOW = EngineShape(StepTime(0.05, 1e-4, 1e-4), max_num_seqs=16, cache_tokens=2**16)
"""About three requests of the trace a second."""


def test_policy_that_serves_follows_a_step_and_loses_nothing():
    rules: list[scaling.ByLoad] = []

    def make() -> scaling.ByLoad:
        rules.append(scaling.ByLoad(Goals(downscale_delay_s=30.0)))
        return rules[-1]

    trace = TRACES["poisson"]
    steps = Steps(60.0, 60.0).times(4.0, random.Random(0), random.Random(0))
    chats = trace.chats(0, 900, 4.0, 0, 32768)
    stepped = ((next(steps), chat) for _, chat in chats)
    settings = CellSettings(SLOW, 1, sizing=Sizing(make, most=6, start_up_s=5.0))
    cell = Cell(settings, stepped, 0)
    tally = cell.run()
    assert tally.e2e.count == 900
    sizes = [size for _, size in cell.sizes]
    assert max(sizes) > 1 and min(sizes[sizes.index(max(sizes)) :]) < max(sizes)
    (rule,) = rules
    assert all(decision.facts for _, decision in rule.decisions)


def test_serves_rule_waits_for_its_delays():
    rule = ByRequests(10.0, upscale_delay_s=5.0, downscale_delay_s=20.0)
    busy = Observation(1, 1, [EngineUse(running=35.0)], most=3)
    assert [rule(busy, float(second)) for second in range(7)] == [1] * 5 + [3, 1]
    idle = Observation(3, 3, [EngineUse()] * 3, most=3)
    sizes = [rule(idle, float(second)) for second in range(100, 122)]
    assert sizes == [3] * 20 + [1, 3]


def test_command_writes_a_file_and_draws_it(tmp_path):
    out = tmp_path / "scale.json"
    words = f"scale --most 2 --rate 2 --period-s 60 --start-up-s 5 --ongoing 64 --out {out}"
    command.main(words.split())
    records = json.loads(out.read_text())["records"]
    assert [record["rule"] for record in records] == ["by load", "64 requests", "fixed"] * 2
    assert all(record["requests"] == 480 for record in records)
    assert all(record["engine_hours"] > 0 for record in records)
    pytest.importorskip("matplotlib")
    command.main(["plot", str(out), "--images", str(tmp_path)])
    assert (tmp_path / "scale.png").stat().st_size > 10_000
