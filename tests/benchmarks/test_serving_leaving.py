"""Clients that leave, and clients that read slowly, against a stub server."""

from __future__ import annotations

import asyncio
import json
import time
from itertools import islice

import pytest

from benchmarks.serving import slow_reader
from benchmarks.serving.beside import median_itl
from benchmarks.serving.conversations import echo
from benchmarks.serving.leaving import (
    Cut,
    Leaver,
    draw_leavers,
    is_free,
    run_leavers,
)
from benchmarks.serving.long_prompts import LongPrompts
from benchmarks.serving.slow_reader import SlowReader
from benchmarks.serving.storm import count, summarise
from tests.benchmarks.stub_server import HEAD, chunk, echoing, serve

PROMPT = " one two three"


async def endless(body, writer):
    """Streams as long as the client is there."""
    writer.write(HEAD)
    while not writer.is_closing():
        writer.write(chunk(b'data: {"choices": [{"text": " one"}]}\n\n'))
        await writer.drain()
        await asyncio.sleep(0.005)


async def leave(target, *leavers):
    async with asyncio.timeout(10):
        return await run_leavers(target, list(leavers))


async def test_clients_leave_when_and_how_they_should():
    async with serve(endless) as target:
        request = target.request(PROMPT, 5)
        lefts = {
            left.cut: left
            for left in await leave(
                target, *(Leaver(request, cut, 0.2) for cut in Cut if cut is not Cut.AFTER_LAST)
            )
        }
        (early,) = await leave(target, Leaver(request, Cut.BEFORE_FIRST, 0.0))
    assert not any(left.whole or left.error for left in lefts.values())
    assert not lefts[Cut.IN_REQUEST].received and lefts[Cut.IN_REQUEST].status is None
    assert not early.received
    for cut in (Cut.MID_STREAM, Cut.RESET, Cut.HALF_CLOSED):
        assert lefts[cut].status == 200 and b" one" in lefts[cut].received
    assert len(lefts[Cut.HALF_CLOSED].received) > len(lefts[Cut.MID_STREAM].received)


async def test_the_end_of_an_answer_is_waited_for():
    async with serve(echoing) as target:
        (left,) = await leave(target, Leaver(target.request(PROMPT, 5), Cut.AFTER_LAST, 0.0))
    assert left.whole and left.status == 200


@pytest.mark.parametrize(
    ("cut", "end"),
    [(Cut.RESET, ConnectionResetError), (Cut.MID_STREAM, b""), (Cut.HALF_CLOSED, b"")],
)
async def test_what_the_server_sees(cut, end):
    seen = asyncio.get_running_loop().create_future()

    async def talk(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HEAD)
        await reader.readexactly(4)
        try:
            seen.set_result(await reader.read())
        except ConnectionError as error:
            seen.set_result(type(error))
        writer.close()

    async with serve(endless) as target:
        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        at = target.__class__(*server.sockets[0].getsockname(), "m")
        await leave(at, Leaver(b"POST / HTTP/1.1\r\n\r\nbody", cut, 0.1))
        assert await asyncio.wait_for(seen, 5) == end
        server.close()


async def test_nobody_there_is_an_error():
    async with serve(endless) as target:
        pass
    (left,) = await leave(target, Leaver(b"x", Cut.MID_STREAM, 1.0))
    assert left.error and left.status is None


def test_leavers_are_of_all_kinds_and_the_same_for_a_seed():
    async def drawn():
        async with serve(endless) as target:
            first, again = (list(islice(draw_leavers(target, 1.0, 0.01, 7), 60)) for _ in range(2))
        return first, again

    first, again = asyncio.run(drawn())
    assert first == again
    assert {leaver.cut for leaver in first} == set(Cut)
    assert 1.0 in {leaver.after_s for leaver in first}
    for leaver in first:
        tokens = json.loads(leaver.request.partition(b"\r\n\r\n")[2])["max_tokens"]
        assert tokens <= 50 if leaver.cut is Cut.AFTER_LAST else tokens >= 200
        assert leaver.after_s <= 1.0


@pytest.mark.parametrize(
    ("changes", "free"),
    [({}, True), ({"booked": 1}, False), ({"free_blocks": 9}, False), ({"waiting": 1}, False)],
)
def test_free_means_that_nothing_is_held(changes, free):
    engine = {"running": 0, "waiting": 0, "booked": 0, "free_blocks": 10, "total_blocks": 10}
    assert is_free({"engines": [engine, {**engine, **changes}]}) is free
    assert not is_free({"engines": []})


async def test_a_storm_s_record_says_when_clients_left():
    async with serve(endless) as target:
        request = target.request(PROMPT, 5)
        lefts = await leave(
            target, Leaver(request, Cut.IN_REQUEST, 0.0), Leaver(request, Cut.MID_STREAM, 0.2)
        )
    record = count(lefts)
    assert (record["without_answer"], record["in_the_middle"], record["whole"]) == (1, 1, 0)
    assert record["cuts"] == {"in the request: no answer": 1, "in the middle: 200": 1}


def test_growth_counts_from_the_baseline():
    sizes = [50.0, 100.0, 90.0, 101.0]
    rounds = [
        {"round": i, "free_after_s": i / 10, "memory_mib": {"ingress": size, "haproxy": 0.0}}
        for i, size in enumerate(sizes, 1)
    ]
    assert summarise(rounds, 2) == {"free_after_s_max": 0.4, "memory_growth": {"ingress": 0.01}}
    assert summarise(rounds, 9) == {"free_after_s_max": 0.4}


@pytest.mark.parametrize("wrong", [False, True])
async def test_a_slow_reader_judges_what_it_got(wrong, monkeypatch):
    async def merging(body, writer):
        """Two tokens alone, then the rest of each of two completions at once, cut in the end."""
        words = echo(body["prompt"], body["max_tokens"]).split(" ")[1:]
        texts = [(" " + " ".join(part), i) for part in (words[:1], words[1:]) for i in (0, 1)]
        texts += [(" more", 1)] if wrong else []
        writer.write(HEAD)
        for text, index in texts:
            value = {"choices": [{"text": text, "index": index}]}
            writer.write(chunk(f"data: {json.dumps(value)}\n\n".encode()))
        writer.write(b"20\r\ndata: {")
        writer.close()

    monkeypatch.setattr(slow_reader, "_PAUSE_S", 0.01)
    async with serve(merging) as target:
        reader = await asyncio.to_thread(SlowReader, target, PROMPT, 2, 40)
        await asyncio.sleep(0.1)
        await asyncio.to_thread(reader.hurry, 5.0)
        reader.leave()
    found = reader.judge()
    assert found["right"] is not wrong
    assert found["tokens"] == 80 + wrong
    assert found["most_tokens_merged"] == 39
    assert found["bytes_before_merging"] > 0


def test_medians_are_taken_over_equal_runs():
    runs = [{"slow": n, "itl_ms": {"p99": p}} for n, p in ((0, 1), (0, 9), (0, 2), (1, 4))]
    assert median_itl(runs, "slow") == {"0": {"p99": 2}, "1": {"p99": 4}}


async def test_long_prompts_are_sent_one_after_the_other():
    bodies = []

    async def refuse(body, writer):
        bodies.append(body)
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\n{}")
        await asyncio.sleep(0.01)

    def send(target):
        with LongPrompts(target, 2, 50, chat=True) as long:
            deadline = time.monotonic() + 10
            while len(bodies) <= 2 and time.monotonic() < deadline:
                time.sleep(0.01)
        return long

    async with serve(refuse) as target:
        long = await asyncio.to_thread(send, target)
    assert long.statuses == {400} and len(long.seconds) == len(bodies) > 2
    assert all(body["messages"][0]["content"].count(" ") == 50 for body in bodies)
