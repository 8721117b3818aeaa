from __future__ import annotations

import threading
from collections import Counter

from deployments.load_table import LoadTable
from engine.outputs import EngineLoad

ENGINES = ["a", "b", "c", "d"]


def test_burst_is_spread_evenly_before_any_report():
    table = LoadTable()
    chosen = [table.book(ENGINES, f"r{i}", cost=100) for i in range(16)]
    assert Counter(chosen) == dict.fromkeys(ENGINES, 4)


def test_burst_from_many_threads_is_spread_evenly():
    table, start, chosen = LoadTable(), threading.Barrier(16), []

    def book(number: int) -> None:
        start.wait()
        chosen.append(table.book(ENGINES, f"r{number}", cost=100))

    threads = [threading.Thread(target=book, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(chosen) == dict.fromkeys(ENGINES, 4)


def test_long_prompts_weigh_more():
    table = LoadTable()
    first = table.book(["a", "b"], "long", cost=4000)
    assert first not in [table.book(["a", "b"], f"r{i}", cost=100) for i in range(3)]


def test_booking_gives_way_to_the_report_that_counts_it():
    table = LoadTable()
    table.book(["a"], "r", cost=1000)
    table.report("a", EngineLoad(num_running=1, running_tokens=10, free_blocks=9, total_blocks=10))
    table.report("b", EngineLoad(num_running=3, running_tokens=500, free_blocks=9, total_blocks=10))
    assert table.book(["a", "b"], "s", cost=1) == "b"
    table.report(
        "a", EngineLoad(num_running=1, running_tokens=10, free_blocks=9, total_blocks=10), ["r"]
    )
    assert table.book(["a", "b"], "t", cost=1) == "a"


def test_crowded_and_lost_engines_come_last():
    table = LoadTable()
    table.report("a", EngineLoad(free_blocks=1, total_blocks=100))
    table.report("b", EngineLoad(num_running=50, free_blocks=50, total_blocks=100))
    assert table.book(["a", "b"], "r", cost=1) == "b"
    assert table.mark_down("b") == ["r"]
    assert table.book(["a", "b"], "s", cost=1) == "a"
    assert table.book(["b"], "t", cost=1) == "b"
    table.report("b", EngineLoad(free_blocks=50, total_blocks=100))
    assert table.book(["a", "b"], "u", cost=1) == "b"


def test_retry_moves_the_booking_and_avoids_who_refused():
    table = LoadTable()
    first = table.book(["a", "b"], "r", cost=10)
    second = table.book(["a", "b"], "r", cost=10, avoid=first)
    assert {first, second} == {"a", "b"}
    assert table.engine_of("r") == second
    assert table.book([first], "r", cost=10, avoid=first) == first
    table.release("r")
    assert table.engine_of("r") is None
    table.set_members("m", ["a", "b"])
    assert [view.num_booked for view in table.view("m")] == [0, 0]


def test_members_are_announced():
    table, told = LoadTable(), []
    table.on_change(lambda: told.append(table.members("m")))
    table.set_members("m", ["a"])
    table.set_members("m", ["a", "b"])
    assert told == [("a",), ("a", "b")]
    table.set_members("m", ["b"])
    assert [view.engine_id for view in table.view("m")] == ["b"]
