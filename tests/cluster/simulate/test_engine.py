"""The simulated engine beside the real scheduler, and beside queueing theory."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

import pytest

from cluster.simulate.cell import Cell, CellSettings
from cluster.simulate.chats import Chat, Turn
from cluster.simulate.engine import EngineShape
from cluster.simulate.ingress import Wires
from cluster.simulate.step_time import StepTime
from tests.cluster.simulate.real_engine import Arrival, RealEngine

PACE = StepTime(0.008, 0.00003, 0.00002, 1e-8)
NO_WIRES = Wires(0.0, 0.0)


def simulated(shape: EngineShape, chats: Iterable[tuple[float, Chat]]) -> Cell:
    cell = Cell(CellSettings(shape, 1, 1, "round_robin", NO_WIRES), chats, 0)
    cell.run()
    return cell


def beside_the_real_one(shape: EngineShape, arrivals: list[Arrival]) -> tuple[list, list]:
    """Times of first tokens and of ends, of the simulated engine and of the real one."""
    real = RealEngine(shape, arrivals)
    real.run()
    chats = [
        (a.when, Chat(b"%d/" % i, [Turn(0.0, len(a.prompt), a.output)]))
        for i, a in enumerate(arrivals)
    ]
    cell = Cell(CellSettings(shape, 1, 1, "round_robin", NO_WIRES), chats, 0)
    firsts: dict[str, float] = {}
    ends: dict[str, float] = {}
    note, spread = cell._note_token, cell._spread

    def on_token(request):
        firsts[request.request_id] = cell.events.now
        note(request)

    def on_news(news):
        ends.update({request.request_id: cell.events.now for request in news.ended})
        spread(news)

    (engine,) = cell.engines
    engine._on_token, engine._on_news = on_token, on_news
    cell.run()
    ids = sorted(real.ends, key=int)
    assert ids == sorted(ends, key=int)
    return (
        [(firsts[i], ends[i]) for i in ids],
        [(real.first_tokens[i], real.ends[i]) for i in ids],
    )


def arrivals(seed: int, number: int, rate: float, prompts: tuple[int, int]) -> list[Arrival]:
    rng, now, found = random.Random(seed), 0.0, []
    for _ in range(number):
        now += rng.expovariate(rate)
        prompt = [rng.randrange(50_000) for _ in range(rng.randint(*prompts))]
        found.append(Arrival(now, prompt, rng.randint(1, 80)))
    return found


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("rate", [2.0, 20.0])
@pytest.mark.parametrize("seed", range(3))
def test_every_step_is_that_of_the_real_scheduler(steps_ahead, rate, seed):
    shape = EngineShape(PACE, 64, 2048, 100_000, 16, steps_ahead)
    ours, real = beside_the_real_one(shape, arrivals(seed, 120, rate, (10, 600)))
    for mine, theirs in zip(ours, real, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-6)


def test_long_prompts_are_cut_into_the_same_chunks():
    shape = EngineShape(PACE, 64, 512, 100_000, 16, 0)
    ours, real = beside_the_real_one(shape, arrivals(7, 40, 4.0, (300, 3000)))
    for mine, theirs in zip(ours, real, strict=True):
        assert mine == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_requests_wait_for_rows_as_long_as_in_the_real_scheduler(steps_ahead):
    shape = EngineShape(PACE, 4, 2048, 100_000, 16, steps_ahead)
    ours, real = beside_the_real_one(shape, arrivals(3, 120, 12.0, (10, 600)))
    waits = [sum(first for first, _ in times) for times in (ours, real)]
    assert waits[0] == pytest.approx(waits[1], rel=0.02)


def test_where_blocks_are_short_the_end_comes_about_as_late():
    shape = EngineShape(PACE, 64, 2048, 4096, 16, 0)
    ours, real = beside_the_real_one(shape, arrivals(3, 120, 20.0, (10, 600)))
    assert max(end for _, end in ours) == pytest.approx(max(end for _, end in real), rel=0.1)


def one_row(steps_ahead: int = 0) -> EngineShape:
    return EngineShape(StepTime(0.01), 1, 2048, 100_000, 16, steps_ahead)


def poisson(rate: float, number: int, outputs: Iterator[int]) -> Iterator[tuple[float, Chat]]:
    rng, now = random.Random(5), 0.0
    for i in range(number):
        now += rng.expovariate(rate)
        yield now, Chat(b"%d/" % i, [Turn(0.0, 10, next(outputs))])


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_one_row_and_one_token_is_the_queue_m_d_1(load):
    cell = simulated(one_row(), poisson(load / 0.01, 10_000, iter(lambda: 1, 0)))
    waited = cell.tally.ttft.mean - 0.01
    assert waited == pytest.approx(load * 0.01 / (2 * (1 - load)), rel=0.08)


def test_one_row_and_geometric_answers_wait_as_pollaczek_and_khinchine_say():
    rng, mean, load = random.Random(6), 20.0, 0.6

    def lengths() -> Iterator[int]:
        while True:
            length = 1
            while rng.random() > 1 / mean:
                length += 1
            yield length

    rate = load / (mean * 0.01)
    cell = simulated(one_row(), poisson(rate, 8_000, lengths()))
    second_moment = (2 * mean * mean - mean) * 0.01**2
    waited = cell.tally.ttft.mean - 0.01
    assert waited == pytest.approx(rate * second_moment / (2 * (1 - load)), rel=0.1)


def test_request_that_never_fits_is_refused_by_name():
    with pytest.raises(ValueError, match="cannot fit into a cache of 160"):
        simulated(
            EngineShape(PACE, cache_tokens=160, block_size=16),
            [(0.0, Chat(b"a", [Turn(0, 1, 200)]))],
        )
