from __future__ import annotations

import asyncio
import time

import pytest

from benchmarks.serving.answers import events as split_events
from benchmarks.serving.answers import read_answer
from benchmarks.serving.client import LOST, Connection, Exchange, Receiver
from tests.benchmarks.stub_server import HEAD, answer, chunk, echoing, events, serve


async def ask(handler, timeout_s: float = 5.0):
    async with serve(handler) as target:
        with Receiver() as receiver:
            connection = await Connection.open(receiver, target.host, target.port)
            exchange = await connection.exchange(target.request(" a b", 2), timeout_s)
        return read_answer(" a b", 2, exchange)


async def test_reads_a_stream():
    result = await ask(echoing)
    assert result.error is None
    assert (result.text, result.request_id) == (" a b", "cmpl-1")
    assert (result.prompt_tokens, result.output_tokens) == (2, 2)
    assert [text for _, text in result.events] == [" a", " b"]


async def test_reads_a_stream_that_comes_byte_by_byte():
    async def drip(body, writer):
        for byte in answer([" a", " b"]):
            writer.write(bytes([byte]))
            await writer.drain()

    result = await ask(drip)
    assert (result.error, result.text) == (None, " a b")


async def test_an_event_counts_from_its_last_byte():
    first, second, *rest = events([" a", " b"], 1)
    begun, completed = asyncio.Event(), []

    async def pause(body, writer):
        writer.write(HEAD + chunk(first) + chunk(second[:9]))
        await begun.wait()
        completed.append(time.monotonic())
        writer.write(chunk(second[9:]) + chunk(b"".join(rest)) + b"0\r\n\r\n")

    async with serve(pause) as target:
        with Receiver() as receiver:
            connection = await Connection.open(receiver, target.host, target.port)
            answer = asyncio.ensure_future(connection.exchange(target.request(" a b", 2), 5.0))
            while not (answer.done() or connection._exchange.pieces):
                await asyncio.sleep(0.001)
            begun.set()
            result = read_answer(" a b", 2, await answer)
    assert result.events[0][0] < completed[0] <= result.events[1][0]


async def test_a_connection_is_used_again():
    ports = []

    async def note(body, writer):
        ports.append(writer.get_extra_info("peername")[1])
        await echoing(body, writer)

    async with serve(note) as target:
        with Receiver() as receiver:
            connection = await Connection.open(receiver, target.host, target.port)
            for _ in range(3):
                exchange = await connection.exchange(target.request(" a", 1), 5.0)
                assert read_answer(" a", 1, exchange).text == " a"
    assert len(ports) == 3 and len(set(ports)) == 1


async def test_a_refusal_is_an_error_with_its_status():
    async def refuse(body, writer):
        writer.write(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 4\r\n\r\nfull")

    assert (await ask(refuse)).error == "HTTP 429: full"


async def test_a_lost_connection_is_an_error():
    async def leave(body, writer):
        writer.write(HEAD + chunk(events([" a"], 1)[0]))
        writer.close()

    assert "connection was lost" in (await ask(leave)).error


async def test_a_connection_that_was_lost_is_told_of():
    async def leave(body, writer):
        await echoing(body, writer)
        writer.close()

    async with serve(leave) as target:
        with Receiver() as receiver:
            connection = await Connection.open(receiver, target.host, target.port)
            await connection.exchange(target.request(" a", 1), 5.0)
            async with asyncio.timeout(5):
                while not connection.lost:
                    await asyncio.sleep(0.001)
            exchange = await connection.exchange(target.request(" a", 1), 5.0)
            assert "lost" in exchange.error


@pytest.mark.parametrize("length", [1, 8_000_000], ids=["short", "longer than is read"])
async def test_an_answer_counts_though_the_server_closes_at_once(length):
    """Even when it has not read the request to its end."""

    async def refuse(reader, writer):
        await reader.read(100)
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 4\r\n\r\nlong")
        await writer.drain()
        await asyncio.sleep(0.05)  # to be received before the reset that follows
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    with Receiver() as receiver:
        connection = await Connection.open(receiver, *server.sockets[0].getsockname()[:2])
        exchange = await connection.exchange(b"x" * length, 5.0)
        assert (exchange.error, exchange.status) == (None, 413)
    server.close()


async def test_a_connection_that_is_lost_just_as_it_is_used_counts_as_lost():
    """Not as a fault of its own: a client may then try again, as that of `load` does."""
    async with serve(echoing) as target:
        connection = await Connection.open(Receiver(), target.host, target.port)
        connection.socket.close()  # as the receiver does with one that was lost
        asyncio.get_running_loop().call_soon(connection.receive)
        exchange = await connection.exchange(target.request(" a", 1), 5.0)
    assert exchange.error == LOST


async def test_a_stream_that_ends_early_is_an_error():
    async def stop(body, writer):
        writer.write(HEAD + chunk(events([" a"], 1)[0]) + b"0\r\n\r\n")

    assert "before [DONE]" in (await ask(stop)).error


async def test_what_is_no_http_is_an_error():
    async def babble(body, writer):
        writer.write(b"SSH-2.0\r\n\r\n")

    assert "not an answer in HTTP/1.1" in (await ask(babble)).error


async def test_an_error_event_is_an_error():
    async def fail(body, writer):
        event = b'data: {"error": {"message": "the engine died"}}\n\ndata: [DONE]\n\n'
        writer.write(HEAD + chunk(event) + b"0\r\n\r\n")

    assert (await ask(fail)).error == "the engine died"


async def test_silence_is_an_error():
    async def wait(body, writer):
        await asyncio.sleep(1.0)

    assert "within 0.05 s" in (await ask(wait, timeout_s=0.05)).error


def test_a_cut_chunk_is_an_error():
    exchange = Exchange(0.0, status=200, chunked=True, pieces=[(1.0, b"9\r\nab0\r\n\r\n")])
    assert "cut" in read_answer("", 1, exchange).error


@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n"])
def test_comments_and_line_ends(end):
    stream = f": ping{end}data: 1{end}event: x{end[: len(end) // 2]}data:2{end}".encode()
    assert list(split_events([(0.5, stream)])) == [(0.5, b"1"), (0.5, b"2")]
