"""How many engines there should be, in virtual time."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from ray.serve.config import AutoscalingContext, AutoscalingPolicy

from cluster import autoscaling
from cluster.autoscaling import Goals, Observation, ScaleByLoad, State, decide
from deployments.app import AUTOSCALING_POLICY
from deployments.config import Autoscaling
from deployments.load_meter import EngineUse
from tests.cluster.autoscaled import Fluid

SPEED_KNOWN = State(speed=1000.0)


def step(low: float, high: float, begin: float, end: float = 1e9):
    return lambda now: high if begin <= now < end else low


def constant(rate: float):
    return lambda now: rate


def sizes(fluid: Fluid) -> list[int]:
    return [size for _, size in fluid.changes]


def test_steady_load_changes_nothing():
    fluid = Fluid(constant(600.0)).run(600)
    assert fluid.changes == []


def test_step_up_starts_what_it_takes_before_the_queue_is_long_and_clears_it():
    fluid = Fluid(step(500.0, 4000.0, 30)).run(200)
    first_at, first_size = fluid.changes[0]
    assert 30 < first_at < 36
    assert 6 <= first_size <= 12
    late = [when for when, wait in fluid.waits if wait > fluid.goals.target_ttft_s]
    assert max(late) < first_at + fluid.start_up_s + 15


def test_engines_that_start_count_as_there():
    known = State(start_up_s=60.0)
    fluid = Fluid(step(500.0, 4000.0, 30), start_up_s=60.0, state=known).run(85)
    assert fluid.ready == 1
    assert fluid.queue > 100_000
    assert len(fluid.changes) <= 2
    assert fluid.target <= 12


def test_step_down_waits_and_then_gives_up_all_that_is_too_much():
    fluid = Fluid(step(4000.0, 500.0, 100), target=6, ready=6, state=SPEED_KNOWN).run(400)
    assert sizes(fluid) == [3, 1]
    assert [when for when, _ in fluid.changes] == pytest.approx([160, 220], abs=2)


def test_load_that_flaps_faster_than_the_delay_keeps_the_engines():
    def flapping(now: float) -> float:
        return 4000.0 if now % 40 < 20 else 200.0

    fluid = Fluid(flapping, goals=Goals(downscale_delay_s=60.0)).run(1200)
    settled = [size for when, size in fluid.changes if when > 120]
    assert settled == sorted(settled, reverse=True)  # a try now and then whether fewer are enough
    assert fluid.target >= 4


@pytest.mark.parametrize(("speed", "doubled"), [(1100.0, 2), (2000.0, 1)])
def test_speed_that_was_doubted_for_nothing_is_doubted_more_slowly(speed, doubled):
    queued = EngineUse(running=1.0, done_tokens_s=speed)
    state = SPEED_KNOWN
    for now in (86_400.0, 86_401.0):
        _, state = decide(Goals(), state, Observation(2, 2, [queued] * 2, most=4), now)
        assert (state.speed, state.doubt_s) == (speed, doubled * autoscaling.DOUBT_S)


def test_a_burst_shorter_than_the_delay_starts_nothing():
    fluid = Fluid(step(300.0, 2500.0, 30, 31)).run(100)
    assert fluid.changes == []


@pytest.mark.parametrize(("in_line", "target"), [(30.0, 3), (0.0, 1)], ids=["line", "long prompt"])
def test_a_line_that_is_felt_is_no_peak_to_wait_out(in_line, target):
    busy = EngineUse(1.0, in_line, 3000.0, arriving_tokens_s=1500.0, arriving_requests_s=15.0)
    known = replace(SPEED_KNOWN, speed_at=100.0)
    decision, _ = decide(Goals(), known, Observation(1, 1, [busy], most=8), 100.0)
    assert decision.target == target
    assert math.ceil(max(decision.needs.values())) == 3


def test_bounds_hold():
    up = Fluid(constant(20_000.0), most=5).run(120)
    assert up.target == 5
    down = Fluid(constant(1.0), least=3, target=6, ready=6).run(200)
    assert down.target == 3


def test_bounds_that_change_are_heeded_at_once():
    seen = Observation(8, 8, [EngineUse()] * 8, least=1, most=4)
    assert decide(Goals(), State(), seen, 0.0)[0].target == 4
    seen = replace(seen, target=1, ready=1, engines=[EngineUse()], least=2)
    assert decide(Goals(), State(), seen, 0.0)[0].target == 2


def test_idle_model_ends_its_engines_one_decision_before_the_last():
    fluid = Fluid(step(2500.0, 0.0, 30), least=0, target=4, ready=4).run(300)
    assert sizes(fluid) == [2, 1, 0]


def test_a_request_of_an_ended_model_brings_an_engine():
    fluid = Fluid(step(0.0, 100.0, 10), least=0, target=0, ready=0, goals=Goals())
    fluid.run(12)
    assert sizes(fluid) == []
    fluid.run(40)
    assert fluid.target >= 1
    assert fluid.queue == 0


def test_first_engine_is_not_ended_before_it_has_told_of_work():
    _, idle = decide(Goals(), State(), Observation(0, 0, [], least=0), 0.0)
    seen = Observation(1, 1, [EngineUse()], least=0)  # Serve has started it without asking
    decision, state = decide(Goals(), idle, seen, 1000.0)
    assert decision.target == 1
    assert decide(Goals(), state, seen, 1001.0)[0].target == 1


def test_a_long_answer_keeps_the_last_engine():
    alone = EngineUse(running=1.0, rows_used=1e-9)
    seen, state = Observation(1, 1, [alone], least=0), State()
    for second in range(1000):
        decision, state = decide(Goals(), state, seen, float(second))
        assert decision.target == 1


def test_speed_seen_where_rows_were_full_is_forgotten_when_steps_are_faster():
    slow = EngineUse(running=1.0, rows_used=0.1, arriving_tokens_s=50.0)
    fast = slow._replace(step_tokens_s=1000.0)
    state = State(speed=20.0)
    for use, needed in ((slow, 2 * 50 / 0.7 / 20), (fast, 2 * 50 / 0.7 / 1000)):
        seen = Observation(8, 8, [use, use, *[EngineUse()] * 6], most=8)
        decision, state = decide(Goals(), state, seen, 0.0)
        assert decision.needs["prompt tokens"] == pytest.approx(needed, rel=1e-3)


def test_lost_engine_is_capacity_to_come():
    fluid = Fluid(constant(1900.0), target=3, ready=3, state=SPEED_KNOWN).run(60)
    assert fluid.changes == []
    fluid.lose()
    fluid.run(70)
    assert fluid.target == 3
    fluid.run(200)
    assert (fluid.ready, fluid.target) == (3, 3)


def test_without_metrics_nothing_changes():
    fluid = Fluid(constant(9000.0), silent=True, target=3, ready=3).run(200)
    assert fluid.changes == []
    assert "no engine tells" in fluid.last.facts


def test_engines_that_are_silent_are_taken_to_be_like_the_others():
    busy = EngineUse(running=40.0, rows_used=0.65)
    needs = [
        decide(Goals(), State(), Observation(4, 4, [busy] * told, most=8), 0.0)[0].needs["rows"]
        for told in (1, 2, 4)
    ]
    assert needs == pytest.approx([4 * 0.65 / 0.7] * 3)


@pytest.mark.parametrize("field", ["rows_used", "blocks_used"])
def test_full_rows_or_cache_ask_for_more_though_nothing_waits(field):
    full = EngineUse(running=60.0, **{field: 0.95})
    goals, state = Goals(upscale_delay_s=0.0), State()
    decision, _ = decide(goals, state, Observation(2, 2, [full] * 2, most=8), 0.0)
    assert decision.target == 3


def test_late_first_tokens_ask_for_more_once_the_engines_have_settled():
    late = EngineUse(running=20.0, rows_used=0.6, ttft_s=9.0)
    seen, state = Observation(2, 2, [late] * 2, most=16), State()
    targets = []
    for second in range(16):
        decision, state = decide(Goals(), state, seen, float(second))
        targets.append(decision.target)
    assert targets[9] == 2
    assert targets[-1] == 4


def test_first_tokens_that_no_engine_could_hasten_do_not_fill_the_cluster():
    alone = EngineUse(running=1.0, rows_used=0.02, ttft_s=60.0)
    state = State()
    for second in range(100):
        seen = Observation(2, 2, [alone] * 2, most=16)
        decision, state = decide(Goals(), state, seen, float(second))
        assert decision.target == 2


def test_start_up_time_is_learnt():
    fluid = Fluid(step(500.0, 4000.0, 30), start_up_s=45.0).run(120)
    assert fluid.state.start_up_s == pytest.approx(45.0, abs=1.0)


def test_a_start_that_was_given_up_is_not_learnt():
    state = State(start_up_s=45.0)
    for now, target, ready in ((0.0, 1, 1), (1.0, 3, 1), (1200.0, 3, 1), (1500.0, 1, 1)):
        seen = Observation(target, ready, [EngineUse()] * ready, most=8)
        _, state = decide(Goals(), state, seen, now)
    assert (state.start_up_s, state.rising) == (45.0, None)


def test_a_start_is_learnt_though_fewer_are_wanted_by_its_end():
    state = State()
    for now, target, ready in ((0.0, 1, 1), (1.0, 5, 1), (15.0, 3, 1), (21.0, 3, 3)):
        seen = Observation(target, ready, [EngineUse()] * ready, most=8)
        _, state = decide(Goals(), state, seen, now)
    assert (state.start_up_s, state.rising) == (20.0, None)


def test_equal_arguments_give_an_equal_decision():
    fluid = Fluid(step(500.0, 4000.0, 30)).run(50)
    seen = fluid._observe(1000.0, 1000.0)
    first = decide(fluid.goals, fluid.state, seen, 51.0)
    assert first == decide(fluid.goals, fluid.state, seen, 51.0)
    assert len(fluid.state.highs) <= fluid.most and len(fluid.state.lows) <= fluid.most


def test_first_requests_of_all_are_decided_on_by_the_wall_clock():
    seen = Observation(1, 1, [EngineUse(running=1.0, arriving_tokens_s=9.0)])
    assert decide(Goals(), State(), seen, 1.8e9)[0].target == 1


def test_months_without_a_queue_do_no_harm():
    use = EngineUse(running=1.0, arriving_tokens_s=50.0)
    seen, months = Observation(2, 2, [use] * 2, most=8), 200 * 86400.0
    decision, _ = decide(Goals(), replace(SPEED_KNOWN, seen_at=months - 1), seen, months)
    assert decision.target == 2


def test_a_start_that_waited_for_a_node_does_not_keep_engines_as_long():
    came = Observation(2, 2, [EngineUse()] * 2, most=8)
    _, state = decide(Goals(), State(rising=(0.0, 2), target=2, ready=1), came, 30_000.0)
    assert state.start_up_s == autoscaling.LONGEST_START_UP_S


def test_goals_are_options_and_have_their_defaults():
    options = Autoscaling().model_dump()
    assert {name: options[name] for name in asdict(Goals())} == asdict(Goals())


def test_engines_may_not_report_so_rarely_that_they_are_not_heeded():
    assert Autoscaling(metrics_interval_s=autoscaling.STALE_S / 2)
    with pytest.raises(ValidationError, match="metrics_interval_s"):
        Autoscaling(metrics_interval_s=autoscaling.STALE_S)


def context(metrics, now: float = 100.0, **changes) -> AutoscalingContext:
    series = {
        name: {"r1": [SimpleNamespace(timestamp=when, value=value)]}
        for name, (when, value) in metrics.items()
    }
    usual = {
        "deployment_id": None, "deployment_name": "Engine-m", "app_name": "app",
        "current_num_replicas": 1, "target_num_replicas": 1, "running_replicas": ["r1"],
        "total_num_requests": 0.0, "total_queued_requests": 0.0, "aggregated_metrics": None,
        "raw_metrics": series, "capacity_adjusted_min_replicas": 1,
        "capacity_adjusted_max_replicas": 8, "policy_state": {}, "last_scale_up_time": None,
        "last_scale_down_time": None, "current_time": now, "config": None,
    }  # fmt: skip
    return AutoscalingContext(**(usual | changes))


def test_policy_reads_what_replicas_told_and_says_why_it_changes_something(caplog):
    policy = AutoscalingPolicy(policy_function=AUTOSCALING_POLICY).get_policy()(upscale_delay_s=0.0)
    told = {"rows_used": (99.0, 1.0), "running": (99.0, 64.0), "unheard_of": (99.0, 1.0)}
    with caplog.at_level("INFO", logger="ray.serve"):
        target, kept = policy(context(told))
        policy(context(told, target_num_replicas=2, policy_state=kept))
    assert target == 2
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("autoscaling Engine-m: 1 -> 2 engines (1 in service, 0 to come")
    assert "1.4 for rows" in line


def test_policy_heeds_nothing_that_is_stale():
    target, _ = ScaleByLoad(upscale_delay_s=0.0)(context({"rows_used": (80.0, 1.0)}))
    assert target == 1
    assert autoscaling.observe(context({"rows_used": (80.0, 1.0)})).engines == []


def test_clock_of_serve_that_goes_back_does_not_hold_engines_back():
    policy = ScaleByLoad(upscale_delay_s=0.0)
    _, kept = policy(context({"rows_used": (9_999.0, 0.1)}, now=10_000.0))
    target, _ = policy(context({"rows_used": (99.0, 1.0)}, now=100.0, policy_state=kept))
    assert target == 2


def test_where_nothing_can_be_decided_the_engines_stay_and_it_is_said_once(caplog):
    policy = ScaleByLoad(upscale_delay_s=0.0)
    kept: dict[str, Any] = {}
    for _ in range(2):
        broken = {"rows_used": (99.0, math.inf)}
        target, kept = policy(context(broken, target_num_replicas=3, policy_state=kept))
        assert target == 3
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert policy(context({"rows_used": (99.0, 1.0)}, policy_state=kept))[0] == 2
