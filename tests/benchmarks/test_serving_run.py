"""The command line against a stub server, and GuideLLM's side of it against a stub program."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from contextlib import contextmanager

import pytest

from benchmarks.serving.__main__ import main
from benchmarks.serving.conversations import Conversation, Mix, Turn
from benchmarks.serving.guidellm import run_guidellm
from benchmarks.serving.load import Target
from tests.benchmarks.stub_server import echoing, serve


@contextmanager
def served(handler=echoing):
    """A stub server in a thread of its own, as the command line has its own event loop."""
    loop, ready, target = asyncio.new_event_loop(), threading.Event(), []

    async def run():
        nonlocal stop
        stop = asyncio.Event()
        async with serve(handler) as at:
            target.append(at)
            ready.set()
            await stop.wait()

    stop: asyncio.Event | None = None
    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    ready.wait(5)
    try:
        yield target[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(5)


def run(target, tmp_path, *words):
    out = tmp_path / "out.json"
    url = f"http://{target.host}:{target.port}"
    small = ["--input", "2", "4", "--output", "2", "5", "--model", "m", "--out", str(out)]
    main(["run", "--target", url, *small, *words])
    return json.loads(out.read_text())


def test_closed_loops_make_a_result_file(tmp_path, capsys):
    with served() as target:
        document = run(target, tmp_path, "--clients", "1", "3", "--requests", "4", "6")
    assert [(r["clients"], r["requests"]) for r in document["records"]] == [(1, 4), (3, 6)]
    assert all(r["completed"] == r["requests"] and not r["errors"] for r in document["records"])
    assert document["command"].startswith("python -m benchmarks.serving run --target")
    assert document["commit"] and document["machine"]["cores"] and document["versions"]["python"]
    assert "| 3 client |" in capsys.readouterr().out
    main(["compare", str(tmp_path / "out.json")])
    assert "| 1 client | 4 | 0 |" in capsys.readouterr().out


def test_open_loops_have_a_rate(tmp_path):
    with served() as target:
        document = run(target, tmp_path, "--rate", "200", "--burst", "4", "--requests", "8")
    (record,) = document["records"]
    assert (record["rate"], record["load"], record["completed"]) == (200, "200 arrival/s", 8)


def test_a_server_that_refuses_everything_is_an_error(tmp_path):
    async def refuse(body, writer):
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 8\r\n\r\nno model")

    with served(refuse) as target, pytest.raises(SystemExit, match="no model"):
        run(target, tmp_path, "--clients", "2")


def test_requests_must_fit_the_loads(tmp_path):
    with served() as target, pytest.raises(SystemExit, match="--requests"):
        run(target, tmp_path, "--clients", "1", "2", "3", "--requests", "4", "6")


def test_guidellm_has_no_open_loop(tmp_path):
    with served() as target, pytest.raises(SystemExit, match="--driver own"):
        run(target, tmp_path, "--rate", "5", "--driver", "guidellm")


def test_a_target_must_be_a_url():
    with pytest.raises(SystemExit, match="--target"):
        main(["run", "--target", "localhost:8000", "--model", "m"])


def test_result_files_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    with served() as target:
        run(target, tmp_path, "--clients", "1", "2", "--requests", "3")
    main(["plot", str(tmp_path / "out.json"), "--images", str(tmp_path)])
    assert (tmp_path / "out.svg").stat().st_size and (tmp_path / "out.png").stat().st_size


STUB = """
import json, sys
options = dict(word.split("=", 1) for word in sys.argv if word.startswith("--") and "=" in word)
data = dict(pair.split("=", 1) for pair in options["--data"].split(","))
rows = json.load(open(data["path"]))
assert options["--constraint"] == "kind=max_requests,count=2", options
assert options["--profile"] == "kind=concurrent,streams=2", options
def request(row):
    body = {"prompt": row["prompt_0"], "max_tokens": row["output_tokens_count_0"]}
    return {
        "request_args": json.dumps({"body": body}), "response_id": "r", "output": " a b",
        "request_start_time": 1000.0, "request_end_time": 1003.0, "prompt_tokens": 2,
        "output_tokens": 2, "time_to_first_token_ms": 500.0, "inter_token_latency_ms": 2500.0,
    }
errored = [{"request_start_time": 1000.0}]
requests = {"successful": [request(row) for row in rows], "errored": errored, "incomplete": []}
benchmark = {"requests": requests, "start_time": 1000.0, "end_time": 1004.0}
report = options["--output"].split("path=")[1]
json.dump({"benchmarks": [benchmark]}, open(report, "w"))
"""


def test_guidellm_gets_the_conversations_and_its_report_is_read(tmp_path):
    program = tmp_path / "stub.py"
    program.write_text(STUB)
    result = run_guidellm(
        f"{sys.executable} {program}",
        Target("127.0.0.1", 1, "m"),
        Mix((2, 2), (2, 2), prefix_tokens=1).draw(0),
        2,
        2,
        tmp_path,
    )
    good, bad = result.answers[:2], result.answers[2:]
    assert result.end - result.begin == pytest.approx(4.0)
    assert result.itl == [2.5, 2.5]
    for answer in good:
        assert answer.prompt.count(" ") == 3 and answer.asked_tokens == 2
        assert (answer.text, answer.output_tokens) == (" a b", 2)
        assert [when - answer.sent for when, _ in answer.events] == pytest.approx([0.5, 3.0])
    assert [answer.error for answer in bad] == ["failed in GuideLLM"]


def test_guidellm_gets_a_column_for_each_turn(tmp_path):
    conversation = Conversation(" x", [Turn(" a", 3), Turn(" b", 4)])
    with pytest.raises(RuntimeError, match="GuideLLM failed"):
        run_guidellm("false", Target("h", 1, "m"), iter([conversation]), 1, 1, tmp_path)
    assert json.loads((tmp_path / "conversations.json").read_text()) == [
        {
            "prompt_0": " x a",
            "output_tokens_count_0": 3,
            "prompt_1": " b",
            "output_tokens_count_1": 4,
        }
    ]
