from __future__ import annotations

import threading
from collections import Counter

import pytest

from deployments import load_table, roll_call
from deployments.load_table import LoadTable
from deployments.placement import Booking, PrefixLoad
from deployments.prefix_index import ROUTING_BLOCK
from engine.errors import EngineDead
from engine.outputs import EngineLoad

ENGINES = dict.fromkeys("abcd", 100)
PAIR = dict.fromkeys("ab", 100)


def test_burst_is_spread_evenly_before_any_report():
    table = LoadTable()
    chosen = [table.book(ENGINES, Booking(f"r{i}", 100)) for i in range(16)]
    assert Counter(chosen) == dict.fromkeys(ENGINES, 4)


def test_burst_from_many_threads_is_spread_evenly():
    table, start, chosen = LoadTable(), threading.Barrier(16), []

    def book(number: int) -> None:
        start.wait()
        chosen.append(table.book(ENGINES, Booking(f"r{number}", 100)))

    threads = [threading.Thread(target=book, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(chosen) == dict.fromkeys(ENGINES, 4)


def test_long_prompts_weigh_more():
    table = LoadTable()
    first = table.book(PAIR, Booking("long", 4000))
    assert first not in [table.book(PAIR, Booking(f"r{i}", 100)) for i in range(3)]


def test_booking_gives_way_to_the_report_that_counts_it():
    table = LoadTable()
    table.book({"a": 100}, Booking("r", 5000))
    table.report("a", EngineLoad(num_running=1, running_tokens=10, free_blocks=9, total_blocks=10))
    table.report("b", EngineLoad(num_running=3, running_tokens=500, free_blocks=9, total_blocks=10))
    assert table.book(PAIR, Booking("s", 1)) == "b"
    table.report(
        "a", EngineLoad(num_running=1, running_tokens=10, free_blocks=9, total_blocks=10), ["r"]
    )
    assert table.book(PAIR, Booking("t", 1)) == "a"


def test_crowded_engines_come_last_and_lost_ones_get_none():
    table = LoadTable()
    table.report("a", EngineLoad(free_blocks=1, total_blocks=100, block_size=16))
    table.report("b", EngineLoad(num_running=50, free_blocks=50, total_blocks=100, block_size=16))
    assert table.book(PAIR, Booking("r", 1)) == "b"
    assert table.mark_down("b") == ["r"]
    assert table.book(PAIR, Booking("s", 1)) == "a"
    assert table.book({"b": 100}, Booking("t", 1)) is None
    table.report("b", EngineLoad(free_blocks=50, total_blocks=100, block_size=16))
    assert table.book(PAIR, Booking("u", 1)) == "b"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_silent_engine_gets_nothing_until_it_reports():
    clock = Clock()
    table = LoadTable(clock=clock)
    table.report("a", EngineLoad())
    for number in range(1, 9):
        clock.now += 1
        table.report("b", EngineLoad())
        chosen = {table.book(PAIR, Booking(f"r{number}.{i}", 100)) for i in range(8)}
        assert chosen == ({"a", "b"} if number < 3 else {"b"})
    # It would be the last with room: whoever waits for the other does not wait for what is stopped.
    assert table.book({"a": 100, "b": 40}, Booking("s", 100)) is None
    table.report("a", EngineLoad())
    assert table.book({"a": 100, "b": 40}, Booking("s", 100)) == "a"


def test_request_of_a_lost_engine_goes_only_where_life_was_shown_since():
    """Engines are stopped one after the other: none that has been is to get what the first had."""
    clock = Clock()
    table = LoadTable(clock=clock)
    asked: list[float] = []
    table.on_doubt(lambda: asked.append(clock.now))
    limits = dict.fromkeys("abc", 100)
    for engine in "abc":
        table.report(engine, EngineLoad())
    clock.now += 0.01  # after its last report the idlest, b, is stopped
    table.mark_down("a")
    moved = [Booking(f"r{i}", 100, resumed=True) for i in range(4)]
    for booking in moved:
        table.expect("d", booking.request_id, 100)
        assert table.book(limits, booking) is None  # nobody has answered yet
    assert asked
    table.report("c", EngineLoad(num_running=50))
    assert table.book(limits, moved[0]) is None  # b may be about to
    clock.now += 1.1 * roll_call.ANSWER_LIMIT_S
    assert [table.book(limits, booking) for booking in moved] == ["c"] * 4
    assert table.book(limits, Booking("new", 100)) == "b"


def test_requests_of_a_lost_engine_are_spread_over_all_that_live():
    table = LoadTable(clock=Clock())
    rooms: list[None] = []
    table.on_room(lambda: rooms.append(None))
    moved = [Booking(f"r{i}", 100, resumed=True) for i in range(4)]
    for booking in moved:
        table.expect("d", booking.request_id, 100)
        assert table.book(PAIR, booking) is None
    table.report("a", EngineLoad())
    assert table.book(PAIR, moved[0]) is None and not rooms
    table.report("b", EngineLoad())
    assert rooms  # those that wait are told
    assert sorted(str(table.book(PAIR, booking)) for booking in moved) == ["a", "a", "b", "b"]


def test_request_of_a_lost_engine_waits_when_none_lives():
    clock = Clock()
    table = LoadTable(clock=clock)
    for engine in PAIR:
        table.report(engine, EngineLoad())
    clock.now += 0.01
    table.expect("d", "r", 100)
    for _ in range(100):
        clock.now += 0.1
        assert table.book(PAIR, Booking("r", 100, resumed=True)) is None
    table.report("b", EngineLoad())
    assert table.book(PAIR, Booking("r", 100, resumed=True)) == "b"


def test_silent_engine_makes_no_other_seem_idle():
    clock = Clock()
    table = LoadTable(clock=clock)
    chat = [bytes([i]) for i in range(64)]
    num_tokens = len(chat) * ROUTING_BLOCK
    table.report("lost", EngineLoad(num_running=500))
    for number in range(4):
        for engine in "abc":
            table.report(engine, EngineLoad(num_running=10))
        if number == 0:
            table.book({"chats": 100}, Booking("first turn", num_tokens, chat))
        table.report("chats", EngineLoad(num_running=40), ["first turn"])
        clock.now += 1
    limits = dict.fromkeys(["lost", "a", "b", "c", "chats"], 1000)
    assert table.book(limits, Booking("second turn", num_tokens, chat)) in "abc"
    table.report("lost", EngineLoad(num_running=500))  # busy, and not lost
    assert table.book(limits, Booking("second turn", num_tokens, chat)) == "chats"


def test_engine_whose_step_is_overdue_gets_nothing_until_it_ends():
    table = LoadTable()
    table.report("a", EngineLoad(overdue=True))
    table.report("b", EngineLoad())
    assert {table.book(PAIR, Booking(f"r{i}", 100)) for i in range(8)} == {"b"}
    assert table.book({"a": 100}, Booking("s", 100)) is None
    table.report("a", EngineLoad())
    assert table.book({"a": 100}, Booking("s", 100)) == "a"


def test_silence_of_all_is_that_of_the_listener():
    clock = Clock()
    table = LoadTable(clock=clock)
    for engine in PAIR:
        table.report(engine, EngineLoad())
    clock.now += 60
    assert {table.book(PAIR, Booking(f"r{i}", 100)) for i in range(8)} == {"a", "b"}
    table.report("a", EngineLoad())  # the first that is read of what has piled up
    assert {table.book(PAIR, Booking(f"s{i}", 100)) for i in range(8)} == {"a", "b"}


def test_engine_that_has_never_reported_is_not_silent():
    clock = Clock()
    table = LoadTable(clock=clock)
    for _ in range(9):
        clock.now += 1
        table.report("a", EngineLoad(num_running=1))
    assert table.book(PAIR, Booking("r", 100)) == "b"


def test_full_engines_get_nothing_until_somebody_tells_of_room():
    table, told = LoadTable(), []
    table.on_room(lambda: told.append(1))
    limits = {"a": 2, "b": 1}
    assert sorted(table.book(limits, Booking(f"r{i}", 1)) for i in range(3)) == ["a", "a", "b"]
    table.release("none")
    assert not told  # nobody was turned away yet
    assert table.book(limits, Booking("s", 1)) is None
    table.release("r0")
    assert told == [1]
    assert table.book(limits, Booking("s", 1)) is not None
    table.report("a", EngineLoad(num_running=1, num_waiting=1), ["r0", "r1", "r2", "s"])
    table.report("b", EngineLoad(num_running=1), ["r0", "r1", "r2", "s"])
    assert table.book(limits, Booking("t", 1)) is None
    table.report("b", EngineLoad(num_running=0))
    assert told == [1, 1]
    assert table.book(limits, Booking("t", 1)) == "b"


def test_booking_after_the_release_leaves_nothing(monkeypatch):
    monkeypatch.setattr(load_table, "RELEASED_KEPT", 2)
    table = LoadTable()
    table.set_members("m", ["a"])
    table.release("r")
    with pytest.raises(EngineDead):
        table.book({"a": 1}, Booking("r", 1))
    assert table.engine_of("r") is None
    assert [view.num_booked for view in table.view("m")] == [0]
    for number in range(5):
        table.release(f"s{number}")
    assert list(table._released) == ["s3", "s4"]


def test_members_are_announced():
    table, told = LoadTable(), []
    table.on_change(lambda: told.append(table.members("m")))
    table.set_members("m", ["a"])
    table.set_members("m", ["a", "b"])
    assert told == [("a",), ("a", "b")]
    table.set_members("m", ["b"])
    assert [view.engine_id for view in table.view("m")] == ["b"]


CHAT = [b"1", b"2", b"3", b"4"]


def test_chat_returns_to_the_engine_that_computed_it():
    table = LoadTable()
    first = table.book(ENGINES, Booking("r", 600, CHAT[:2]))
    assert {table.book(ENGINES, Booking(f"s{i}", 600)) for i in range(7)} == set(ENGINES)
    table.report(first, EngineLoad(num_running=3), ["r"])  # its prompt is in the cache now
    assert table.book(ENGINES, Booking("n", 600, CHAT[:3])) == first
    table.release("r", CHAT)  # and what it answered
    table.report(first, EngineLoad(num_running=4), ["n"])
    assert table.book(ENGINES, Booking("t", 600, CHAT)) == first


def test_prompts_on_their_way_are_in_no_cache_yet():
    table = LoadTable()
    chosen = [table.book(ENGINES, Booking(f"r{i}", 600, CHAT)) for i in range(16)]
    assert Counter(chosen) == dict.fromkeys(ENGINES, 4)


def test_what_others_send_is_known_too():
    table = LoadTable()
    table.report("c", EngineLoad(num_running=1), heard=[CHAT[:1], CHAT])
    assert table.book(ENGINES, Booking("r", 600, CHAT)) == "c"


def test_index_is_no_larger_than_the_cache():
    table = LoadTable()
    table.report("a", EngineLoad(total_blocks=16, block_size=16), heard=[CHAT])
    table.report("b", EngineLoad(total_blocks=32, block_size=16), heard=[CHAT])
    assert table.book(PAIR, Booking("r", 600, CHAT)) == "b"


def test_request_that_ended_before_it_was_placed_leaves_no_blocks():
    table = LoadTable()
    table.release("r", CHAT)
    assert table.engine_of("r") is None
    assert Counter(table.book(PAIR, Booking(f"s{i}", 600, CHAT)) for i in range(4)) == {
        "a": 2,
        "b": 2,
    }


def test_margin_bounds_what_a_cache_attracts():
    now = 0.0
    table = LoadTable(clock=lambda: now)
    table.report("a", EngineLoad(num_running=1), heard=[CHAT] * 18)
    table.report("b", EngineLoad(num_running=1))
    assert table.book(PAIR, Booking("r", 600, CHAT), PrefixLoad(0.25)) == "a"
    assert table.book(PAIR, Booking("s", 600, CHAT), PrefixLoad(0.0)) == "b"
