from __future__ import annotations

import asyncio
from itertools import islice

import pytest

from benchmarks.serving.conversations import (
    WORDS,
    Conversation,
    Mix,
    Turn,
    arrivals,
    count_words,
    echo,
)
from benchmarks.serving.load import closed_loop, open_loop
from tests.benchmarks.stub_server import echoing, serve
from tests.deployments.plane import bundled_tokenizer


def test_each_word_is_one_token_and_they_do_not_merge():
    tokenizer = bundled_tokenizer()
    text = "".join(f" {word}" for word in [*WORDS, *reversed(WORDS)])
    ids = tokenizer.encode(text, False)
    assert len(ids) == count_words(text) == 2 * len(WORDS)
    assert ids == tokenizer.encode(text)  # nothing is put before it
    assert tokenizer.decode(ids) == text


def test_a_mix_is_the_same_for_the_same_seed_and_keeps_its_ranges():
    mix = Mix((3, 5), (7, 9), turns=2, prefix_tokens=4, prefixes=2)
    drawn = list(islice(mix.draw(1), 50))
    assert drawn == list(islice(mix.draw(1), 50))
    assert drawn != list(islice(mix.draw(2), 50))
    turns = [turn for each in drawn for turn in each.turns]
    assert {count_words(turn.text) for turn in turns} == {3, 4, 5}
    assert {turn.output_tokens for turn in turns} == {7, 8, 9}
    prefixes = {each.prefix for each in drawn}
    assert len(prefixes) == 2
    assert {count_words(prefix) for prefix in prefixes} == {4}


@pytest.mark.parametrize("burst", [1, 16])
def test_arrivals_have_the_rate_and_come_in_bursts(burst):
    times = list(islice(arrivals(20.0, burst, seed=3), 16_000))
    assert times[-1] == pytest.approx(16_000 / 20.0, rel=0.1)
    assert len(set(times)) == 16_000 // burst


def test_echo_repeats_the_prompt():
    assert echo(" a b c", 5) == " a b c a b"


async def test_a_closed_loop_keeps_its_clients_busy():
    running, most = 0, 0

    async def slow(body, writer):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.005)
        running -= 1
        await echoing(body, writer)

    async with serve(slow) as target:
        load = await closed_loop(target, Mix((2, 4), (3, 6)).draw(0), clients=4, count=12)
    run = load.read()
    assert most == 4
    assert len(run.answers) == 12
    for answer in run.answers:
        assert answer.error is None
        assert answer.text == echo(answer.prompt, answer.asked_tokens)
        assert answer.output_tokens == answer.asked_tokens
    assert run.begin <= run.full[0] <= run.end and run.full[1] <= run.end


async def test_a_turn_has_all_that_was_said_before():
    conversation = Conversation(" x", [Turn(" a b", 4), Turn(" c", 2), Turn(" d", 1)])
    async with serve(echoing) as target:
        load = await closed_loop(target, iter([conversation]), clients=1, count=1)
    assert [answer.prompt for answer in load.read().answers] == [
        " x a b",
        " x a b x a b x c",
        " x a b x a b x c x a d",
    ]


async def test_an_open_loop_does_not_wait_for_answers():
    begun, all_begun = [], asyncio.Event()

    async def slow(body, writer):
        begun.append(body)
        if len(begun) == 4:
            all_begun.set()
        await all_begun.wait()
        await echoing(body, writer)

    times = [0.0, 0.02, 0.04, 0.06]
    async with serve(slow) as target:
        load = await open_loop(target, Mix((1, 1), (1, 1)).draw(0), iter(times), count=4)
    answers = load.read().answers
    assert [answer.error for answer in answers] == [None] * 4
    sent = sorted(answer.sent for answer in answers)
    assert sent == pytest.approx([load.begin + after for after in times])


async def test_a_server_that_is_gone_is_an_error_of_each_request():
    async with serve(echoing) as target:
        pass
    load = await open_loop(target, Mix((1, 1), (1, 1)).draw(0), iter([0.0, 0.0]), count=2)
    assert ["cannot connect" in answer.error for answer in load.read().answers] == [True, True]


async def test_a_failed_turn_ends_its_conversation():
    async def refuse(body, writer):
        writer.write(b"HTTP/1.1 503 Unavailable\r\nContent-Length: 0\r\n\r\n")

    async with serve(refuse) as target:
        load = await closed_loop(target, Mix((1, 1), (1, 1), turns=3).draw(0), clients=1, count=2)
    assert [answer.error for answer in load.read().answers] == ["HTTP 503: "] * 2
