import pytest

from benchmarks.step_profile import (
    period_seconds,
    profile_table,
    step_seconds,
    summarise_steps,
)
from tests.benchmarks.steps import Step


def test_decode_and_mixed_steps_are_told_apart():
    steps = [
        Step(device_s=0.01, idle_s=None),
        Step(device_s=0.03, idle_s=0.01, rows=4),
        Step(device_s=0.05, idle_s=0.0, rows=3),
        Step(decode=False, tokens=100, device_s=0.1, idle_s=0.09),
    ]
    summary = summarise_steps(steps)
    decode, mixed = summary["decode"], summary["mixed"]
    assert (decode["steps"], mixed["steps"], mixed["tokens"]) == (3, 1, 100)
    assert decode["mean_rows"] == 3
    assert decode["seconds"]["device"] == {"median": 0.03, "mean": 0.03, "total": 0.09}
    assert decode["seconds"]["update"]["total"] == pytest.approx(0.015)
    assert summary["gpu_idle_share"] == pytest.approx(0.1 / 0.29, abs=1e-4)


def test_a_host_that_tells_no_device_times_has_no_idle_share():
    summary = summarise_steps([Step()])
    assert summary["gpu_idle_share"] is None
    assert "device" not in summary["decode"]["seconds"]
    assert summary["mixed"] == {"steps": 0}
    assert step_seconds(Step()) == pytest.approx(0.015)
    assert step_seconds(Step(device_s=0.5)) == 0.5
    assert period_seconds(Step(device_s=0.5)) is None
    assert period_seconds(Step(device_s=0.5, idle_s=0.25)) == 0.75


def test_the_table_has_a_row_for_each_kind_of_step():
    record = {"workload": "w", "engine": "e", "profile": summarise_steps([Step(device_s=0.01)])}
    (row,) = profile_table([record, {"workload": "x", "engine": "e"}]).splitlines()[2:]
    assert row.startswith("| w | e | decode | 1 | 1.000 ms, 0.00 s | 2.000 ms")
    assert "10.000 ms, 0.01 s | - | 0.0% |" in row
    assert profile_table([{"workload": "x"}]) == ""
