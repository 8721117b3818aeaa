"""How many engines a model needs, decided from what its engines tell.

Ray Serve calls `ScaleByLoad` in its controller; the simulator calls `decide` itself. Serve copies
this module by value into the controller: nothing here may hold state.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ray.serve.config import AutoscalingContext

from deployments.load_meter import LATELY_S, EngineUse

START_UP_S = 30.0
"""Start-up time of an engine before one has been seen to start."""
LONGEST_START_UP_S = 1800.0
"""What takes longer has waited for a node. To wait as long again helps nobody."""
CATCH_UP_S = 10.0
"""A queue should be gone so long after new engines are there, or within another start-up time."""
SETTLE_S = 10.0
"""Times to the first token say nothing of engines that came or went within this time."""
MOST_GROWTH = 2.0
"""Late first tokens alone ask for at most so many times the engines. They tell that there are too
few, but not by how much."""
STALE_S = 10.0
"""What an engine told longer ago counts as not told."""
DOUBT_S = 7200.0
"""Without a queue nobody knows how fast engines can be. They may do other work than when that was
seen, so that the speed is taken to double in this time: in the end fewer are tried. Where those are
too few, as the queue that they get shows, the next try takes twice as long."""
SAME_SPEED = 1.5
"""Speeds that differ by less are equal."""
MOST_DOUBLINGS = 64.0
"""By then the speed asks for nothing; later, after months, no float could hold it."""
NO_TRAFFIC_TOKENS_S = 1.0
"""Fewer tokens a second are the rest of a rate that fades."""

_ROUNDING = 1e-6
_STATE = "trunkline"
_FAILED = "trunkline_failed"
"""Keys of ours in the state that Serve keeps."""

Window = tuple[tuple[float, int], ...]
"""Times and sizes, the oldest first."""


@dataclass(frozen=True, slots=True)
class Goals:
    """What the number of engines is for; the options of the same names."""

    target_ttft_s: float = 2.0
    target_use: float = 0.7
    upscale_delay_s: float = 3.0
    downscale_delay_s: float = 300.0


@dataclass(frozen=True, slots=True)
class Observation:
    """A model's engines and what waits for them."""

    target: int
    """Engines that there are to be, by the last decision."""
    ready: int
    """Engines in service; up to `target` the others start."""
    engines: Sequence[EngineUse]
    """Of those in service, as many as have told."""
    held: float = 0.0
    """Requests that wait before the engines, for one with room."""
    least: int = 1
    most: int = 1


@dataclass(frozen=True, slots=True)
class State:
    """What a decision keeps for the next one."""

    highs: Window = ()
    """Sizes lately wanted of which every later one is smaller: the first is the largest."""
    lows: Window = ()
    """And those of which every later one is larger."""
    start_up_s: float = START_UP_S
    """How long the last start took."""
    speed: float = 0.0
    """Prompt tokens a second that an engine got done when there was a queue; 0 before the first."""
    speed_at: float = 0.0
    """When that was."""
    doubt_s: float = DOUBT_S
    """In which it is taken to double."""
    held: float = 0.0
    """Requests that waited before the engines."""
    held_growth: float = 0.0
    """By how many more each second, lately."""
    seen_at: float | None = None
    """When the last decision was made."""
    rising: tuple[float, int] | None = None
    """Since when engines start, and how many there are to be then."""
    target: int = 0
    ready: int = 0
    ready_since: float = -math.inf
    """Since when so many engines are in service."""


@dataclass(frozen=True, slots=True)
class Decision:
    """How many engines there should be from now on, and why."""

    target: int
    needs: dict[str, float] = field(default_factory=dict)
    """Engines by what asks for them, before rounding."""
    facts: str = ""
    """What that was computed from."""

    def explain(self, seen: Observation) -> str:
        """A line for the log."""
        needs = ", ".join(f"{value:.1f} for {name}" for name, value in self.needs.items())
        starting = max(0, seen.target - seen.ready)
        return (
            f"{seen.target} -> {self.target} engines ({seen.ready} in service, {starting} to come, "
            f"{seen.least} to {seen.most} allowed): needs {needs or 'none'}; {self.facts}"
        )


def decide(goals: Goals, state: State, seen: Observation, now: float) -> tuple[Decision, State]:
    """Choose the number of engines. A pure function: equal arguments give an equal result.

    It rises to the least that was wanted throughout `upscale_delay_s`, or to what is wanted now
    where a line of requests is longer than the engines that there are to be get through within
    `target_ttft_s`: that peak is felt already. It falls to the most that was wanted within
    `downscale_delay_s` or a start-up, whichever is longer. So do the stabilization windows of
    Kubernetes' horizontal pod autoscaler: a shorter peak or pause changes nothing. It falls by half
    at most, as what remains may turn out slower than it seemed.

    Args:
        goals: of the model.
        state: that the last decision returned; `State()` before the first.
        seen: what there is.
        now: seconds of a clock that does not go back.
    """
    highs = state.highs if state.ready else ()  # the first engine is given time for its first work
    state = _follow_held(_follow_speed(_follow_starts(state, seen, now), seen, now), seen, now)
    if seen.engines:
        needs, facts = _needs(goals, state, seen, now)
        wanted = math.ceil(max(needs.values()) - _ROUNDING)
    else:  # what starts may be what somebody waits for
        needs, facts = {}, f"no engine tells its load, {seen.held:.0f} requests wait"
        wanted = max(seen.target, int(seen.held > 0))
    wanted = _within(wanted, seen)
    highs, lows = highs or ((now, seen.target),), state.lows or ((now, seen.target),)
    patience_s = max(goals.downscale_delay_s, state.start_up_s)  # those that start are given time
    highs = _add(highs, (now, wanted), now - patience_s, falling=True)
    delay_s = 0.0 if _is_behind(goals, state, seen) else goals.upscale_delay_s
    lows = _add(lows, (now, wanted), now - delay_s, falling=False)
    most_down = seen.target // 2
    target = _within(min(max(seen.target, lows[0][1]), max(highs[0][1], most_down)), seen)
    if target < seen.target:
        highs = ((now, target),)  # to be seen for as long before there are fewer still
    return Decision(target, needs, facts), replace(state, highs=highs, lows=lows)


def _follow_starts(state: State, seen: Observation, now: float) -> State:
    """Learn how long engines take to start, and since when how many are there."""
    more_come = seen.target > state.target or seen.ready < state.ready
    if state.rising is None and more_come and seen.ready < seen.target:
        state = replace(state, rising=(now, seen.target))
    elif state.rising is not None and seen.ready >= min(state.rising[1], seen.target):
        if seen.ready > state.ready:  # else no more are wanted, and nothing is known of a start
            took = min(max(1.0, now - state.rising[0]), LONGEST_START_UP_S)
            state = replace(state, start_up_s=took)
        state = replace(state, rising=None)
    if seen.ready != state.ready:
        state = replace(state, ready=seen.ready, ready_since=now)
    return replace(state, target=seen.target)


def _follow_speed(state: State, seen: Observation, now: float) -> State:
    """Learn how fast engines are from those that have a queue; what kept them from more, such as
    rows that were taken, may be over when steps without one are faster."""
    queued = [engine.done_tokens_s for engine in seen.engines if engine.done_tokens_s > 0]
    if queued:
        return _learn_speed(state, sum(queued) / len(queued), now)
    steps = [engine.step_tokens_s for engine in seen.engines if engine.step_tokens_s > 0]
    if state.speed > 0 and sum(steps) > state.speed * len(steps):
        return replace(state, speed=sum(steps) / len(steps), speed_at=now)
    return state


def _learn_speed(state: State, speed: float, now: float) -> State:
    """Take over the speed of a queue, and learn whether it was right to doubt the last one."""
    doubt_s = state.doubt_s
    if now - state.speed_at > doubt_s / 4:  # else the doubt has changed next to nothing
        doubt_s = DOUBT_S if speed > SAME_SPEED * state.speed else 2 * doubt_s
    return replace(state, speed=speed, speed_at=now, doubt_s=doubt_s)


def _follow_held(state: State, seen: Observation, now: float) -> State:
    """Learn how fast requests pile up before engines that are full: they get no more than they can
    do, and so do not see how much there is."""
    elapsed = 0.0 if state.seen_at is None else now - state.seen_at
    fading = math.exp(-elapsed / LATELY_S)
    growth = state.held_growth * fading + (seen.held - state.held) / LATELY_S
    return replace(state, held=seen.held, held_growth=growth, seen_at=now)


def _needs(
    goals: Goals, state: State, seen: Observation, now: float
) -> tuple[dict[str, float], str]:
    """Engines by what asks for them, and the figures behind that.

    Rows and blocks in use stay the same when more engines share the load, by Little's law: so many
    requests come, and each stays so long. Prompt tokens need the speed that engines have shown.
    """
    engines, use = seen.engines, goals.target_use
    unknown = max(1.0, seen.ready / len(engines))  # those that are silent are taken to be alike
    length = _mean_prompt(seen)
    arriving = unknown * sum(engine.arriving_tokens_s for engine in engines)
    arriving += max(0.0, state.held_growth) * length
    waiting = unknown * sum(engine.waiting_tokens for engine in engines) + seen.held * length
    busy = arriving > NO_TRAFFIC_TOKENS_S or waiting > 0 or any(e.running for e in engines)
    needs = {
        "any request": float(busy),
        "rows": unknown * sum(engine.rows_used for engine in engines) / use,
        "KV cache": unknown * sum(engine.blocks_used for engine in engines) / use,
    }
    speed = state.speed * 2 ** min((now - state.speed_at) / state.doubt_s, MOST_DOUBLINGS)
    if speed > 0:
        queue = waiting + _growth(state, seen, arriving, speed, now)
        catch_up = max(0.0, queue) / max(CATCH_UP_S, state.start_up_s)
        needs["prompt tokens"] = (arriving / use + catch_up) / speed
    ttft = _ttft(state, seen, now)
    if ttft > goals.target_ttft_s:
        late = seen.ready * min(ttft / goals.target_ttft_s, MOST_GROWTH)
        # An engine with little to do is slow for other reasons than too much of it.
        needs["first tokens"] = min(late, math.ceil(MOST_GROWTH * max(needs.values())))
    return needs, (
        f"{arriving:.0f} tok/s come, {waiting:.0f} tokens wait, an engine does {speed:.0f} tok/s, "
        f"first tokens take {ttft:.2f} s, a start {state.start_up_s:.0f} s"
    )


def _is_behind(goals: Goals, state: State, seen: Observation) -> bool:
    """Whether requests stand in line for longer than first tokens may take. (One long prompt that
    an engine computes is no line.)"""
    in_line = seen.held + sum(engine.waiting for engine in seen.engines)
    able = state.speed * max(seen.ready, seen.target) * goals.target_ttft_s
    return 0 < able < in_line * _mean_prompt(seen)


def _growth(state: State, seen: Observation, arriving: float, speed: float, now: float) -> float:
    """Prompt tokens by which the queue will have grown when an engine that starts now is there:
    first without those that start already, then with them."""
    later = state.start_up_s
    if state.rising is not None:
        later = min(later, max(0.0, now - state.rising[0]))
    sooner = state.start_up_s - later
    to_come = max(seen.ready, seen.target)
    return (arriving - speed * seen.ready) * sooner + (arriving - speed * to_come) * later


def _mean_prompt(seen: Observation) -> float:
    """Tokens of the prompts that came lately; those that wait before the engines are like them."""
    tokens = sum(engine.arriving_tokens_s for engine in seen.engines)
    requests = sum(engine.arriving_requests_s for engine in seen.engines)
    return tokens / requests if requests > 0 else 1.0


def _ttft(state: State, seen: Observation, now: float) -> float:
    """Mean over the engines that have had requests lately."""
    times = [engine.ttft_s for engine in seen.engines if engine.ttft_s > 0]
    if not times or now - state.ready_since < SETTLE_S:
        return 0.0
    return sum(times) / len(times)


def _within(size: int, seen: Observation) -> int:
    return max(seen.least, min(size, seen.most))


def _add(window: Window, newest: tuple[float, int], since: float, *, falling: bool) -> Window:
    """Add what is wanted now, and drop what is too old or can be the extreme no more."""
    kept = [
        (when, size)
        for when, size in window
        if when > since and (size > newest[1] if falling else size < newest[1])
    ]
    return (*kept, newest)


class ScaleByLoad:
    """A policy of Ray Serve: `decide` on what the replicas' `record_autoscaling_stats` told.

    Args:
        goals: the fields of `Goals`.
    """

    def __init__(self, **goals: float) -> None:
        self._goals = Goals(**goals)

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Called by Serve's controller several times a second; logs each change.

        It never raises, as Serve would stop to look after all applications then: where nothing can
        be decided, the number of engines stays, and what was learnt is forgotten.
        """
        logger = logging.getLogger("ray.serve")  # not a global, which would be copied
        try:
            seen = observe(ctx)
            state = ctx.policy_state.get(_STATE, State())
            # Not the time of Serve, which may go back. What we keep does not outlive this process.
            decision, state = decide(self._goals, state, seen, time.monotonic())
        except Exception:
            if _FAILED not in ctx.policy_state:  # else it has been said
                logger.exception("autoscaling %s: cannot decide", ctx.deployment_name)
            return ctx.target_num_replicas, {_FAILED: True}
        if decision.target != seen.target:
            logger.info("autoscaling %s: %s", ctx.deployment_name, decision.explain(seen))
        return decision.target, {_STATE: state}


def observe(ctx: AutoscalingContext) -> Observation:
    """What Serve knows of a deployment."""
    told = [_last_told(ctx, replica) for replica in ctx.running_replicas]
    return Observation(
        target=ctx.target_num_replicas,
        ready=ctx.current_num_replicas,
        engines=[use for use in told if use is not None],
        held=ctx.total_queued_requests,
        least=ctx.capacity_adjusted_min_replicas,
        most=ctx.capacity_adjusted_max_replicas,
    )


def _last_told(ctx: AutoscalingContext, replica: Any) -> EngineUse | None:
    """The newest figures of a replica, or None if it has told none lately."""
    fresh = {}
    for name in EngineUse._fields:
        series = ctx.raw_metrics.get(name, {}).get(replica)
        if series and series[-1].timestamp > ctx.current_time - STALE_S:
            fresh[name] = series[-1].value
    return EngineUse(**fresh) if fresh else None
