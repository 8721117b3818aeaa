"""The account of a soak: what counts as right, refused, broken or lost."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from benchmarks.serving.client import LOST, Exchange, Receiver
from benchmarks.serving.soak.__main__ import go_through, has_passed
from benchmarks.serving.soak.memory import OF_PLANE, SAMPLES, MemoryWatch
from benchmarks.serving.soak.outcome import Outcome, Sent, judge, read
from benchmarks.serving.soak.scripts import CHAT, COMPLETIONS, Script, draw_scripts
from benchmarks.serving.soak.traffic import ask
from tests.benchmarks.stub_server import serve

SCRIPT = Script("chat", CHAT, b"{}")
BAD_SCRIPT = Script("bad", COMPLETIONS, b"{}", 400)
CHOICE = {"index": 0, "text": "a b", "finish_reason": "length"}
WHOLE = {"choices": [CHOICE], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}


def streamed(*parts: dict[str, object], end: str = "data: [DONE]\n\n") -> Exchange:
    body = "".join(f"data: {json.dumps(part)}\n\n" for part in parts) + end
    return Exchange(10.0, 200, pieces=[(11.0, body.encode())])


def unstreamed(body: dict[str, object], status: int = 200, **more: str) -> Exchange:
    return Exchange(10.0, status, pieces=[(11.0, json.dumps(body).encode())], **more)


def chunk(text: str, reason: str | None = None) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}]}


NO_ENGINE = {"error": {"code": "engine_unavailable"}}
ENGINE_LOST = {"error": {"code": "engine_lost"}}
USAGE = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}


def test_streamed_and_whole_answers_say_the_same():
    assert read(streamed(chunk("a "), chunk("b", "length"), USAGE)) == read(unstreamed(WHOLE))


@pytest.mark.parametrize(
    ("exchange", "script", "left", "outcome"),
    [
        (unstreamed(WHOLE), SCRIPT, False, Outcome.COMPLETED),
        (unstreamed(WHOLE), SCRIPT, True, Outcome.COMPLETED),
        (unstreamed({"error": {}}, 429, retry_after="1"), SCRIPT, False, Outcome.REFUSED),
        (unstreamed({"error": {}}, 503), SCRIPT, False, Outcome.LOST),
        (unstreamed(NO_ENGINE, 503, retry_after="1"), SCRIPT, False, Outcome.REFUSED),
        (unstreamed(ENGINE_LOST, 503, retry_after="1"), SCRIPT, False, Outcome.LOST),
        (unstreamed(ENGINE_LOST, 503, retry_after="1"), SCRIPT, True, Outcome.LEFT),
        (Exchange(10.0, 503, retry_after="1"), SCRIPT, False, Outcome.REFUSED),
        (unstreamed({"error": {}}, 400), BAD_SCRIPT, False, Outcome.REJECTED),
        (unstreamed({"error": {}}, 400), SCRIPT, False, Outcome.LOST),
        (unstreamed({"error": {}}, 500), SCRIPT, False, Outcome.LOST),
        (streamed(chunk("a "), USAGE), SCRIPT, False, Outcome.WRONG),
        (streamed(chunk("a b", "length"), USAGE, end=""), SCRIPT, False, Outcome.LOST),
        (streamed({"error": {"message": "no"}}), SCRIPT, False, Outcome.LOST),
        (Exchange(10.0, 200, error=LOST), SCRIPT, False, Outcome.LOST),
        (Exchange(10.0, 200, error=LOST), SCRIPT, True, Outcome.LEFT),
        (Exchange(19.5, 200, error=LOST), SCRIPT, False, Outcome.BROKEN),
    ],
)
def test_every_request_is_accounted_for(exchange, script, left, outcome):
    right = {SCRIPT: read(unstreamed(WHOLE))}
    ended = exchange.sent + 2.0
    found, why = judge(Sent(script, exchange, left, ended), right, [(20.0, 25.0)])
    assert found == outcome and bool(why) == (outcome in (Outcome.WRONG, Outcome.LOST))


class SlowScript(Script):
    """Takes a while to make, as anything does on a machine that has much else to do."""

    def request(self, target):
        time.sleep(0.03)
        return super().request(target)


async def test_a_client_that_leaves_is_not_taken_for_one_that_was_cut_off():
    async def wait(body, writer):
        await asyncio.sleep(1.0)

    async with serve(wait) as target:
        with Receiver() as receiver:
            sent = await ask(target, receiver, SlowScript("chat", CHAT, b"{}"), leave_s=0.02)
    assert judge(sent, {}, [])[0] == Outcome.LEFT


def test_what_is_lost_can_be_found_in_the_log_of_a_proxy():
    exchange = Exchange(10.0, error=LOST, port=40961)
    _, why = judge(Sent(SCRIPT, exchange, False, 12.0), {}, [])
    assert why == "chat: the connection was lost (status 0, after 2.00 s, port 40961)"


def test_scripts_are_the_same_for_the_same_seed():
    scripts = draw_scripts("m", 100, 2, seed=3)
    assert scripts == draw_scripts("m", 100, 2, seed=3) != draw_scripts("m", 100, 2, seed=4)
    assert {script.status for script in scripts} == {200, 400, 404}


def test_memory_that_grows_is_told_from_memory_that_does_not():
    watch = MemoryWatch()
    for number in range(SAMPLES + 2):
        filled = min(number, OF_PLANE.baseline)
        watch.take({1: ("ingress", 100.0 + 50 * filled), 2: ("haproxy", 100.0 + 15 * number)})
    found = watch.summarise()
    assert found["ingress"]["flat"] and found["ingress"]["growth"] == 0
    assert not found["haproxy"]["flat"]


def test_process_that_grows_is_not_hidden_by_a_small_one_that_grows_by_a_larger_share():
    watch = MemoryWatch()
    for number in range(SAMPLES):
        watch.take({1: ("ingress", 5.0 + number), 2: ("ingress", 100.0 + 10 * number)})
    assert not watch.summarise()["ingress"]["flat"]


@pytest.mark.parametrize(("each_request", "flat"), [(0.0, True), (1.0, False)])
def test_daemon_may_grow_with_processes_that_are_started_but_not_with_requests(each_request, flat):
    watch = MemoryWatch()
    for number in range(3 * SAMPLES):
        started = min(number, 2 * SAMPLES)
        watch.take({1: ("others", 80.0 + 3 * started + each_request * number)})
    assert watch.summarise()["others"]["flat"] is flat


FLAT = {role: {"flat": True} for role in ("ingress", "engine_actor", "engine_replica", "proxy")}


@pytest.mark.parametrize(
    ("changed", "passed"),
    [
        ({}, True),
        ({"outcomes": {Outcome.LOST: 1}}, False),
        ({"not_free": 1}, False),
        ({"memory": FLAT | {"proxy": {"flat": False}}}, False),
        ({"memory": {}}, False),
        ({"memory": {k: v for k, v in FLAT.items() if k != "engine_actor"}}, False),
        ({"memory": {k: v for k, v in FLAT.items() if k != "proxy"}}, True),
    ],
)
def test_soak_passes_only_if_all_was_well_and_was_looked_at(changed, passed):
    record = {"outcomes": {Outcome.COMPLETED: 9}, "not_free": 0, "memory": FLAT}
    assert has_passed(record | changed) == passed


@pytest.mark.parametrize(("minutes", "with_faults"), [(30, 18), (14, 2), (1, 0)])
async def test_processes_of_both_ends_live_long_enough_to_be_judged(minutes, with_faults):
    now = 100.0
    faults = []

    async def go_round(strikes: bool) -> dict[str, object]:
        nonlocal now
        now += 60.0
        faults.append(strikes)
        return {"number": len(faults)}

    records = await go_through(go_round, 60.0 * minutes, lambda: now)
    assert [record["number"] for record in records] == list(range(1, len(faults) + 1))
    assert faults == [False] * SAMPLES + [True] * with_faults + [False] * SAMPLES
