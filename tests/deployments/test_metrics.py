"""What is told to Ray, whose gauges are stood in for."""

from types import SimpleNamespace

import pytest

from deployments import metrics
from deployments.metrics import EngineMetrics, Publisher
from deployments.samples import FAMILIES, Histogram, Sample
from deployments.wire import EngineReport
from engine.outputs import EngineLoad


@pytest.fixture
def told(monkeypatch):
    """What Ray was told, in order: name, value, labels."""
    calls = []

    def gauge(name, says, tag_keys):
        def record(value, labels):
            assert says and tuple(labels) == tag_keys
            calls.append((name, value, labels))

        return SimpleNamespace(set=record)

    monkeypatch.setattr(metrics, "Gauge", gauge)
    return calls


def test_ray_is_told_again_what_has_not_changed(told):
    """It would drop it."""
    publisher = Publisher()
    samples = [Sample("num_engines", 1, {"model_name": name}) for name in "ab"]
    for _ in range(2):
        publisher.publish(samples)
    assert told == 2 * [("trunkline_num_engines", 1, {"model_name": name}) for name in "ab"]


def test_a_histogram_is_three_gauges(told):
    histogram = Histogram((1.0, 2.0))
    histogram.add(1.5)
    Publisher().publish(histogram.samples("time_to_first_token_seconds", {"model_name": "m"}))
    name = "trunkline_time_to_first_token_seconds"
    buckets = [(f"{name}_bucket", count, {"model_name": "m", "le": bound})
               for bound, count in (("1.0", 0), ("2.0", 1), ("+Inf", 1))]  # fmt: skip
    others = [(f"{name}_{what}", value, {"model_name": "m"})
              for what, value in (("sum", 1.5), ("count", 1))]  # fmt: skip
    assert told == buckets + others


def test_reports_are_told_now_and_then(told, monkeypatch):
    now = 100.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    engine = EngineMetrics("m")
    for _ in range(3):
        engine.record(EngineReport([], EngineLoad(num_running=3, generated_tokens=7, idle_s=2.5)))
    assert len(told) == len({name for name, _, _ in told})
    values = {name.removeprefix("trunkline_"): value for name, value, _ in told}
    assert values.keys() <= FAMILIES.keys()
    assert values["num_requests_running"] == 3
    assert (values["generation_tokens_total"], values["device_idle_seconds_total"]) == (7, 2.5)
    told.clear()
    now += metrics.PUBLISH_INTERVAL_S
    engine.record(EngineReport([], EngineLoad(num_running=4)))
    assert ("trunkline_num_requests_running", 4, {"model_name": "m"}) in told
