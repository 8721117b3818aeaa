from __future__ import annotations

import pickle
import random
from collections import Counter
from typing import Any

from deployments.engine_state import LATELY_S, EngineState
from deployments.placement import (
    AFFINITY_MARGIN,
    LITTLE_TRAFFIC,
    PATIENCE,
    Booking,
    Place,
    PowerOfTwo,
    PrefixLoad,
    RoundRobin,
)
from deployments.prefix_index import ROUTING_BLOCK
from engine.outputs import EngineLoad

CHAT = [b"1", b"2", b"3", b"4"]
NUM_TOKENS = len(CHAT) * ROUTING_BLOCK + 10
NOW = 1000.0


def engine(cached: int = 0, sent: float = 0.0, **load: Any) -> EngineState:
    """An engine with so many blocks of `CHAT` in its cache."""
    state = EngineState(EngineLoad(**load), sent=sent, last_sent=NOW, last_booking=0.5)
    state.index.use(CHAT[:cached])
    return state


def place(**engines: EngineState) -> Place:
    return PrefixLoad().choose(engines, list(engines), Booking("r", NUM_TOKENS, CHAT), NOW)


def test_chat_returns_to_its_cache_even_if_others_have_less_to_do():
    assert place(a=engine(), b=engine(cached=4, num_running=5)) == ("b", 10)
    assert place(a=engine(cached=2), b=engine(cached=3, num_running=1)).engine_id == "b"


def test_chat_goes_where_the_wait_is_not_longer_than_computing_it_anew():
    busy = engine(cached=4, waiting_tokens=PATIENCE + NUM_TOKENS)
    assert place(a=engine(), b=busy) == ("a", NUM_TOKENS)
    assert place(a=engine(), b=engine(cached=4, waiting_tokens=PATIENCE)).engine_id == "b"


def test_chat_leaves_an_engine_that_is_busier_by_the_margin():
    bound = (1 + AFFINITY_MARGIN) * LITTLE_TRAFFIC
    others = {name: engine(num_running=1) for name in "abc"}
    assert place(**others, d=engine(cached=4, num_running=2, sent=bound - 2)).engine_id == "d"
    assert place(**others, d=engine(cached=4, num_running=2, sent=bound - 1)).engine_id != "d"


def test_bound_grows_with_the_traffic_of_all():
    others = {name: engine(num_running=40) for name in "abc"}
    assert place(**others, d=engine(cached=4, num_running=42, sent=10)).engine_id == "d"
    assert place(**others, d=engine(cached=4, num_running=42, sent=20)).engine_id != "d"


def test_engine_without_work_is_never_too_busy():
    assert place(a=engine(), b=engine(cached=4, sent=1000)).engine_id == "b"


def test_requests_of_a_while_ago_are_forgotten():
    state = engine(sent=20)
    assert state.sent_lately(NOW) == 20
    assert 7 < state.sent_lately(NOW + LATELY_S) < 8
    assert state.sent_lately(NOW + 10 * LATELY_S) < 0.01


def test_engine_short_of_blocks_comes_last():
    full = {"free_blocks": 70, "total_blocks": 1000, "block_size": 16}
    roomy = {"free_blocks": 100, "total_blocks": 1000, "block_size": 16, "num_running": 200}
    assert place(a=engine(**full), b=engine(**roomy)).engine_id == "b"
    # What the cache holds takes no blocks, and without any report nothing is known to be short.
    assert place(a=engine(cached=4, **full), b=engine(**roomy)).engine_id == "a"
    assert place(a=engine(), b=engine(**roomy)).engine_id == "a"


def test_blocks_stay_in_the_process():
    copy = pickle.loads(pickle.dumps(Booking("r", 5, CHAT)))
    assert copy == Booking("r", 5)


def choose_often(policy: Any, engines: dict[str, EngineState], count: int) -> list[str]:
    """Choices of the policy, each booked as the load table does."""
    chosen = []
    for number in range(count):
        place = policy.choose(engines, list(engines), Booking(f"r{number}", NUM_TOKENS, CHAT), NOW)
        engines[place.engine_id].book(f"r{number}", place.num_tokens, CHAT, NOW)
        engines[place.engine_id].last_booking = number + 1
        chosen.append(place.engine_id)
    return chosen


def test_round_robin_takes_turns():
    engines = {"a": engine(cached=4, num_running=50), "b": engine(), "c": engine()}
    chosen = choose_often(RoundRobin(), engines, 9)
    assert sorted(chosen[:3]) == ["a", "b", "c"]
    assert chosen == chosen[:3] * 3


def test_power_of_two_takes_the_lesser_of_two():
    random.seed(0)
    chosen = Counter(choose_often(PowerOfTwo(), {name: engine() for name in "abc"}, 300))
    assert len(chosen) == 3 and max(chosen.values()) - min(chosen.values()) < 90
    idle, busy = engine(num_running=3), engine(num_running=3, waiting_tokens=1)
    assert set(choose_often(PowerOfTwo(), {"a": idle, "b": busy}, 1)) == {"a"}
    assert choose_often(PowerOfTwo(), {"a": engine()}, 1) == ["a"]
