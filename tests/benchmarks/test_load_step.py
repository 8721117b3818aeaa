"""What a run with a step in the load comes to."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime
from itertools import pairwise

import pytest

from benchmarks.serving import load_step
from benchmarks.serving.answers import Answer
from benchmarks.serving.conversations import echo
from benchmarks.serving.leaving import read_health
from benchmarks.serving.load import Target

PHASES = [(30, 4.0), (60, 32.0), (30, 4.0)]


def test_arrivals_have_the_rates_of_their_phases():
    times = list(load_step.arrivals(PHASES, 0))
    assert all(a < b for a, b in pairwise(times))
    middle = sum(30 <= when < 90 for when in times)
    assert middle / 60 == pytest.approx(32, rel=0.1)
    assert (len(times) - middle) / 60 == pytest.approx(4, rel=0.3)
    assert times == list(load_step.arrivals(PHASES, 0))


def answer(sent: float, ttft: float, text: str | None = None) -> Answer:
    said = echo(" a b", 2) if text is None else text
    return Answer(
        prompt=" a b", asked_tokens=2, sent=sent, events=[(sent + ttft, said)], output_tokens=2
    )


def test_judgement_counts_late_lost_and_wrong():
    answers = [answer(100 + n, 3.0 if 32 <= n < 41 else 0.1) for n in range(100)]
    answers += [answer(150, 0.1, "else"), Answer(" a b", 2, sent=151, error="cut")]
    found = load_step.judge(answers, 100.0, 30.0, 90.0, 1.0)
    assert (found["requests"], found["lost"], found["wrong"]) == (102, {"cut": 1}, 1)
    assert found["late_until_s"] == 15.0
    calm = load_step.judge([answer(130.0, 0.1)], 100.0, 30.0, 90.0, 1.0)
    assert calm["late_until_s"] is None


@pytest.mark.parametrize("option", ["--rate 0", "--rate x", "--times -1", "--seconds 30 nan 30"])
def test_a_load_that_is_none_is_refused(option, capsys):
    with pytest.raises(SystemExit):
        load_step.parse(["run", *option.split()])
    assert "is not a number above 0" in capsys.readouterr().err


@pytest.mark.parametrize("answer", [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n{"])
async def test_the_census_outlives_answers_that_are_none(answer):
    async def speak(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(speak, "127.0.0.1", 0) as server:
        target = Target(*server.sockets[0].getsockname(), "m")
        with pytest.raises(OSError):
            await asyncio.to_thread(read_health, target)


def test_decisions_are_read_from_the_log_of_the_controller(tmp_path):
    folder = tmp_path / "session_1" / "logs" / "serve"
    folder.mkdir(parents=True)
    line = (
        "INFO 2026-11-22 01:18:50,250 controller 7 -- autoscaling Engine-fake: 1 -> 5 engines "
        "(1 in service, 0 to come, 1 to 8 allowed): needs 4.4 for prompt tokens; 800 tok/s come"
    )
    (folder / "controller_7.log").write_text(f"INFO something else\n{line}\n")
    began = datetime(2026, 11, 22, 1, 18, 48).timestamp()
    (found,) = load_step.read_decisions(tmp_path, began)
    assert (found["at_s"], found["from"], found["to"]) == (2.2, 1, 5)
    assert found["why"].startswith("4.4 for prompt tokens")


def test_start_up_lasts_until_all_are_there():
    decisions = [{"at_s": 33.0, "from": 1, "to": 4}, {"at_s": 40.0, "from": 4, "to": 5}]
    sizes = [(0.0, 1), (41.0, 3), (43.5, 4), (50.0, 5)]
    assert load_step.start_up(decisions, sizes, 30.0) == 10.5
    assert load_step.start_up([], sizes, 30.0) is None


def test_a_run_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    record = {
        "phases": PHASES,
        "sizes": [(0.5, 1), (45.0, 5), (110.0, 1)],
        "decisions": [{"at_s": 33.0, "to": 5}, {"at_s": 100.0, "to": 1}],
        "ttft_p95_s": [(0.0, 0.1), (35.0, 2.0), (60.0, 0.1)],
    }
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"target_ttft_s": 1.0, "records": [record]}))
    load_step.main(["plot", str(file), "--images", str(tmp_path)])
    assert (tmp_path / "run.png").stat().st_size > 10_000
