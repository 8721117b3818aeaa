"""Whole fleets: nothing is lost, the same seed gives the same run, routing is the real one."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest

from cluster.autoscaling import Observation
from cluster.simulate.cell import Cell, CellSettings, Sizing
from cluster.simulate.chats import Chat, Turn
from cluster.simulate.engine import EngineShape
from cluster.simulate.fleet import FleetSettings, share, simulate, sum_of_shares
from cluster.simulate.ingress import Wires
from cluster.simulate.step_time import StepTime
from cluster.simulate.traces import TRACES
from deployments.placement import POLICIES
from tests.deployments import fleet as real

SHAPE = EngineShape(StepTime(0.004, 1e-5, 2e-5, 1e-8), cache_tokens=2**17)
CELL = CellSettings(SHAPE, num_engines=4)


def settings(trace: str = "chats", policy: str = "prefix_load", **changes) -> FleetSettings:
    usual = FleetSettings(replace(CELL, policy=policy), TRACES[trace], 8, 600, 10.0)
    return replace(usual, **changes)


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_ends_and_every_token_is_counted(trace, policy):
    fleet = settings(trace, policy, requests=240)
    tally = simulate(fleet)
    asked = [
        turn.answered
        for cell, requests in enumerate((120, 120))
        for _, chat in TRACES[trace].chats(cell, requests, 40.0, 0, fleet.max_tokens)
        for turn in chat.turns
    ]
    assert len(asked) == tally.e2e.count == tally.ttft.count == 240
    assert sum(engine.requests for engine in tally.engines) == 240
    assert sum(engine.output_tokens for engine in tally.engines) == sum(asked)
    assert tally.itl.count == sum(asked) - 240
    computed = sum(engine.computed_tokens for engine in tally.engines)
    assert computed + tally.cached_tokens == tally.prompt_tokens
    assert all(engine.busy_s <= engine.service_s for engine in tally.engines)


def test_seed_decides_everything_and_the_number_of_workers_nothing():
    first, again, shared_out, other = (
        simulate(settings(), 1),
        simulate(settings(), 1),
        simulate(settings(), 2),
        simulate(settings(seed=1), 1),
    )
    assert first.record() == again.record() == shared_out.record()
    assert other.record() != first.record()


def test_nothing_is_lost_where_engines_are_full():
    shape = replace(SHAPE, max_num_seqs=2, cache_tokens=8192)
    for ingresses in (1, 3):
        cell = CellSettings(shape, 4, ingresses)
        tally = simulate(settings("poisson", cell=cell, num_engines=4, rate=60.0))
        assert tally.e2e.count == 600
        assert tally.ttft.quantile(0.5) > 0.5


@pytest.mark.parametrize("engines", [1, 7, 8, 9])
def test_cells_have_all_engines_and_requests_between_them(engines):
    tally = simulate(settings(num_engines=engines, requests=101))
    assert len(tally.engines) == engines
    assert tally.e2e.count == 101


def test_same_seed_gives_the_same_run_in_another_process():
    code = (
        "from tests.cluster.simulate.test_fleet import settings, simulate;"
        "print(simulate(settings(requests=200)).record())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == repr(simulate(settings(requests=200)).record())


def test_shares_add_up():
    for number in range(7):
        assert sum(share(30, 7, before) for before in range(number)) == sum_of_shares(30, 7, number)


SCRIPT = {"pause_s": 1.0, "every_s": 0.05}


def real_and_simulated(policy: str, script: list[real.Chat]) -> tuple[real.Fleet, Cell]:
    """The same chats with real schedulers and with simulated engines."""
    random.seed(repr(0))
    fleet = real.Fleet(POLICIES[policy](0.25), cache_tokens=16384)
    chats = [
        (
            chat.start,
            Chat(
                chat.name.encode(),
                [
                    Turn(pause if number else 0.0, len(said), len(answered))
                    for number, ((said, answered, _), pause) in enumerate(
                        zip(chat.turns, [0.0, *(turn[2] for turn in chat.turns)], strict=False)
                    )
                ],
            ),
        )
        for chat in script
    ]
    step_time = StepTime(real.STEP_S, real.TOKEN_S, real.TOKEN_S)
    shape = EngineShape(step_time, 256, 2048, 16384, real.BLOCK_SIZE, 0)
    wires = Wires(real.WIRE_S, real.WIRE_S)
    fleet.run(script)
    cell = Cell(CellSettings(shape, 4, 1, policy, wires), chats, 0)
    cell.run()
    return fleet, cell


@pytest.mark.parametrize("policy", ["prefix_load", "round_robin"])
def test_choices_are_as_over_real_schedulers_that_tell_of_every_step(policy):
    script = real.scripted_chats(24, 4, (60, 200), (20, 60), **SCRIPT)
    fleet, cell = real_and_simulated(policy, script)
    sent = [engine.requests for engine in cell.tally.engines]
    assert sent == pytest.approx(list(fleet.sent.values()), abs=1)
    assert cell.tally.cached_tokens == pytest.approx(fleet.hits, rel=0.02)
    assert cell.tally.ttft.mean == pytest.approx(sum(fleet.ttfts) / len(fleet.ttfts), rel=0.02)


def test_load_in_step_with_the_hour_takes_fewer_engines():
    steady = settings("day", num_engines=4, requests=3000, rate=10.0)
    sizes: list[tuple[float, int]] = []

    def follow(seen: Observation, now: float) -> int:
        wanted = 1 + sum(engine.running + engine.waiting for engine in seen.engines) // 4
        sizes.append((now, min(int(wanted), 4)))
        return sizes[-1][1]

    sizing = Sizing(lambda: follow, interval_s=2.0, start_up_s=3.0)
    sized = replace(steady.cell, num_engines=1, sizing=sizing)
    cell = Cell(sized, steady.trace.chats(0, 3000, 10.0, 0, 32768), 0)
    tally = cell.run()
    assert tally.e2e.count == 3000
    assert len(Counter(size for _, size in sizes)) > 1
    used = sum(engine.service_s for engine in tally.engines)
    assert tally.end_s < used < 4 * tally.end_s
