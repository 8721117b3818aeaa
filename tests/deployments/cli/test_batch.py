"""Batch files, on a server and in this process."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import httpx
import pytest

from deployments.api_keys import KEY_VARIABLES
from deployments.cli import batch, local_app
from deployments.cli.batch_file import BatchRequest
from deployments.cli.client import Answer
from deployments.cli.errors import CommandError
from deployments.cli.local_app import open_local_app, post_to
from deployments.cli.main import main
from deployments.config import ModelOptions
from engine.config import BUNDLED_MODEL, EngineConfig
from engine.errors import StepFailed
from engine.outputs import TokenDelta
from tests.deployments.fake_core import FakeCore


def line(custom_id: str, prompt: str = "one two", **more: Any) -> bytes:
    values = {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "m", "prompt": prompt, "max_tokens": 4},
        **more,
    }
    return json.dumps(values).encode()


def records(path) -> dict[str | None, dict[str, Any]]:
    found = [json.loads(each) for each in path.read_text().splitlines()]
    assert len({record["id"] for record in found}) == len(found)
    return {record["custom_id"]: record for record in found}


def test_answers_are_the_servers_own(url, tmp_path, write_lines, capsys):
    chat = {
        "model": "m",
        "messages": [{"role": "user", "content": "Grüße, 世界"}],
        "max_tokens": 40,
    }
    wrong = {"model": "m", "prompt": "x", "temperature": -1}
    requests = write_lines(
        line("a", "three four"),
        line("b", url="/v1/chat/completions", body=chat),
        line("c", body=wrong),
    )
    out = tmp_path / "out.jsonl"
    assert main(["batch", str(requests), str(out), "--url", url]) == 1
    assert "2 answered, 1 refused, 0 bad lines" in capsys.readouterr().out
    found = records(out)
    for custom_id, path, body in (
        ("a", "/v1/completions", json.loads(line("a", "three four"))["body"]),
        ("b", "/v1/chat/completions", chat),
        ("c", "/v1/completions", wrong),
    ):
        direct = httpx.post(url + path, json=body)
        record = found[custom_id]
        assert record["error"] is None and set(record) == {"id", "custom_id", "response", "error"}
        response = record["response"]
        assert response["status_code"] == direct.status_code
        assert response["request_id"]
        assert content(response["body"]) == content(direct.json())
    assert found["c"]["response"]["body"]["error"]["param"] == "temperature"


def content(body: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if key not in ("id", "created")}


BAD = {
    b"{": "invalid_json",
    b"\xff\xfe": "invalid_json",
    b"[" * 100_000: "invalid_json",
    b"[1]": "invalid_line",
    b'{"custom_id": 7}': "invalid_line",
    line("m1", method="GET"): "invalid_method",
    line("u1", url="/v1/moderations"): "invalid_url",
    line("u2", url=None): "invalid_url",
    line("b1", body=None): "invalid_body",
    line("b2", body={"model": "m", "prompt": "x", "stream": True}): "invalid_body",
}


def test_bad_lines_are_told_and_end_nothing(url, tmp_path, write_lines, capsys):
    requests = write_lines(*BAD, b"", line("good"), line("good"))
    out = tmp_path / "out.jsonl"
    for _ in range(2):  # nothing is told twice
        assert main(["batch", str(requests), str(out), "--url", url]) == 1
        told = f"1 answered, 0 refused, {len(BAD) + 1} bad lines"
        assert told in capsys.readouterr().out
        found = [json.loads(each) for each in out.read_text().splitlines()]
        errors = {r["error"]["line"]: r["error"]["code"] for r in found if r["error"]}
        assert errors == {
            **dict(enumerate(BAD.values(), 1)),
            len(BAD) + 3: "duplicate_custom_id",
        }
        assert all(r["response"] is None and r["error"]["message"] for r in found if r["error"])
        (answered,) = (r for r in found if not r["error"])
        assert answered["custom_id"] == "good" and answered["response"]["status_code"] == 200
        assert len(found) == len(BAD) + 2


def test_what_is_answered_is_not_asked_again(url, tmp_path, write_lines, capsys):
    out = tmp_path / "out.jsonl"
    kept = b'{"id": "1", "custom_id": "a", "response": {"status_code": 200}, "error": null}\n'
    out.write_bytes(kept + b'{"id": "2", "custom_id": "b", "resp')  # cut off by a crash
    requests = write_lines(line("a"), line("b"), line("c"))
    assert main(["batch", str(requests), str(out), "--url", url]) == 0
    assert "3 answered, 0 refused, 0 bad lines" in capsys.readouterr().out
    assert out.read_bytes().startswith(kept)
    found = records(out)
    assert set(found) == {"a", "b", "c"}
    assert found["b"]["response"]["body"]["choices"]


def test_other_files_are_not_written_to(url, tmp_path, write_lines, capsys):
    out = tmp_path / "notes.txt"
    out.write_text("my notes\n")
    assert main(["batch", str(write_lines(line("a"))), str(out), "--url", url]) == 1
    assert "name another file" in capsys.readouterr().err
    assert out.read_text() == "my notes\n"


async def test_in_this_process_answers_are_the_same(url):
    body = json.dumps({"model": "m", "prompt": ["five six", "seven"], "max_tokens": 6}).encode()
    async with open_local_app("m", ModelOptions(), partial(FakeCore)) as app:
        answers = await asyncio.gather(*(post_to(app, "/v1/completions", body) for _ in range(20)))
        refused = await post_to(app, "/v1/completions", b'{"model": "other", "prompt": "x"}')
    direct = await asyncio.to_thread(httpx.post, url + "/v1/completions", content=body)
    for answer in answers:
        assert answer.status == 200
        assert content(json.loads(answer.body)) == content(direct.json())
    assert refused.status == 404


@pytest.mark.parametrize("keys", ["sk-of-a-server", ""])
@pytest.mark.parametrize("variable", KEY_VARIABLES)
async def test_in_this_process_no_key_is_asked_for(monkeypatch, variable, keys):
    monkeypatch.setenv(variable, keys)
    body = json.dumps({"model": "m", "prompt": "five six", "max_tokens": 6}).encode()
    async with open_local_app("m", ModelOptions(), FakeCore) as app:
        assert (await post_to(app, "/v1/completions", body)).status == 200


class FailsOnce(FakeCore):
    failed = False

    def step(self) -> list[TokenDelta]:
        if self.failed:
            return super().step()
        self.failed = True
        raise StepFailed("out of luck", self.fail_all("The step failed."))


async def test_in_this_process_requests_survive_a_failed_step(url):
    body = json.dumps({"model": "m", "prompt": "five six", "max_tokens": 6}).encode()
    async with open_local_app("m", ModelOptions(), FailsOnce) as app, asyncio.timeout(20):
        answer = await post_to(app, "/v1/completions", body)
    direct = await asyncio.to_thread(httpx.post, url + "/v1/completions", content=body)
    assert content(json.loads(answer.body)) == content(direct.json())


def test_without_a_url_the_model_runs_here(tmp_path, write_lines, monkeypatch):
    started: list[EngineConfig] = []

    def start(config: EngineConfig) -> FakeCore:
        started.append(config)
        return FakeCore(config)

    monkeypatch.setattr(local_app, "open_local_app", partial(open_local_app, start_core=start))
    body = {"model": BUNDLED_MODEL, "prompt": "one two", "max_tokens": 2, "n": 3}
    requests = write_lines(*(line(str(i), body=body) for i in range(40)))
    out = tmp_path / "out.jsonl"
    options = ["--set", "engine.max_num_seqs=4", "--concurrency", "40"]
    assert main(["batch", str(requests), str(out), *options]) == 0
    assert [config.max_num_seqs for config in started] == [4]
    found = records(out)
    assert set(found) == {str(i) for i in range(40)}
    for record in found.values():
        choices = record["response"]["body"]["choices"]
        assert [choice["text"] for choice in choices] == ["one two"] * 3


class Stub:
    """Answers with one thing after the other, the last one for ever."""

    def __init__(self, *answers: Answer | Exception) -> None:
        self.answers = list(answers)
        self.calls = self.running = self.most = 0

    async def post(self, path: str, body: bytes) -> Answer:
        self.calls += 1
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


OK = Answer(200, {}, b'{"id": "cmpl-1"}')


@pytest.fixture
def pauses(monkeypatch):
    taken: list[float] = []
    sleep, here = asyncio.sleep, threading.current_thread()

    async def pause(seconds: float) -> None:
        if seconds and threading.current_thread() is here:  # a server may run in another
            taken.append(seconds)
            seconds = 0
        await sleep(seconds)

    monkeypatch.setattr(asyncio, "sleep", pause)
    return taken


async def answer_all(stub: Stub, count: int = 1, concurrency: int = 4) -> list[dict[str, Any]]:
    written: list[dict[str, Any]] = []
    requests = iter([BatchRequest(str(i), "/v1/completions", {}) for i in range(count)])
    await batch.BatchRunner(stub.post, written.append, concurrency).run(requests)
    return written


async def test_no_more_than_asked_for_are_under_way():
    stub = Stub(OK)
    written = await answer_all(stub, count=50, concurrency=4)
    assert (stub.most, stub.calls) == (4, 50)
    assert {record["custom_id"] for record in written} == {str(i) for i in range(50)}


async def test_busy_servers_are_asked_again_when_they_say(pauses):
    stub = Stub(Answer(429, {"retry-after": "7"}, b""), Answer(503, {"retry-after": "3"}, b""), OK)
    (record,) = await answer_all(stub)
    assert record["response"]["status_code"] == 200
    assert pauses == [7, 3]


async def test_a_server_that_stays_busy_has_the_last_word(pauses, monkeypatch):
    monkeypatch.setattr(batch, "MAX_BUSY", 3)
    (record,) = await answer_all(Stub(Answer(429, {}, b'{"error": {"message": "no"}}')))
    assert record["response"]["status_code"] == 429
    assert record["response"]["body"]["error"]["message"] == "no"
    assert pauses == [1, 2, 4]


async def test_a_lost_server_ends_the_run_and_answers_stay_open(pauses):
    back = Stub(ConnectionError("refused"), ConnectionError("refused"), OK)
    assert len(await answer_all(back)) == 1
    with pytest.raises(CommandError, match="again goes on with the rest"):
        await answer_all(Stub(ConnectionError("refused")), count=3)


def test_a_key_that_is_taken_no_more_ends_the_run_and_answers_stay_open(
    tmp_path, write_lines, monkeypatch, capsys
):
    """Such an answer says nothing of the request, which is asked again with another key."""
    refused = Answer(401, {}, b'{"error": {"message": "Incorrect API key provided."}}')
    forbidden = Answer(403, {}, b'{"error": {"message": "Not this model."}}')

    @asynccontextmanager
    async def open_post(options):
        yield stub.post

    monkeypatch.setattr(batch, "_open_post", open_post)
    requests, out = write_lines(line("a"), line("b"), line("c")), tmp_path / "out.jsonl"
    words = ["batch", str(requests), str(out), "--url", "x", "--concurrency", "1"]
    stub = Stub(forbidden, refused)
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "asks for another API key" in said and "again goes on with the rest" in said
    assert "401 to 'b': Incorrect API key provided." in said
    assert [record["response"]["status_code"] for record in records(out).values()] == [403]
    stub = Stub(OK)
    assert main(words) == 1  # as one is refused
    assert "2 answered, 1 refused, 0 bad lines" in capsys.readouterr().out


def test_pauses_are_bounded():
    assert batch.pause_s("86400", 1) == batch.LONGEST_PAUSE_S
    assert batch.pause_s("-5", 1) == 0
    assert batch.pause_s("Thu, 01 Jan 1970 00:00:00 GMT", 1) == 0
    assert batch.pause_s("soon", 3) == 4


def test_wrong_use_is_a_sentence(tmp_path, write_lines, capsys):
    requests, out = str(write_lines(line("a"))), str(tmp_path / "out.jsonl")
    assert main(["batch", str(tmp_path / "none.jsonl"), out]) == 1
    assert "none.jsonl: No such file" in capsys.readouterr().err
    assert main(["batch", requests, out, "--url", "http://127.0.0.1:9", "--model", "x"]) == 1
    assert "leave --model" in capsys.readouterr().err
    assert main(["batch", requests, out, "--url", "http://127.0.0.1:9"]) == 1
    assert "nothing answers at http://127.0.0.1:9" in capsys.readouterr().err
