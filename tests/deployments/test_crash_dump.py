"""Crash dumps: what they hold, what they must not, and how many there are."""

from __future__ import annotations

import json
import os
import re
import time

import msgspec
import pytest
import torch

from deployments.crash_dump import (
    FIRST_DUMPS,
    LAST_DUMPS,
    PART_LIMIT_S,
    PREFIX,
    describe_error,
    describe_state,
    write_crash_dump,
)
from deployments.engine_actor import EngineActor
from deployments.wire import Submission, encode
from engine.core import EngineCore
from engine.errors import EngineDead, InvalidRequest, StepFailed
from engine.kv_cache.block_pool import InvariantViolation
from tests.engine.conftest import request, tiny_config, tiny_model  # noqa: F401

SECRETS = (r"\b257,\s*257\b", r"1\.2345", "stop here")
"""Tokens, parameter and stop string of `private_request`; a time may hold the digits of a token."""


def private_request(request_id: str, max_tokens: int = 8):
    params = {"repetition_penalty": 1.2345, "stop": ["stop here"]}
    return request(request_id, [257] * 5, max_tokens=max_tokens, **params)


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def test_versions_and_details_are_there(tmp_path):
    path = write_crash_dump(str(tmp_path / "new"), "exception", more={"a": [1]})
    dump = json.loads(path.read_text())
    assert dump["versions"].keys() >= {"python", "trunkline", "torch", "ray", "cuda"}
    assert (dump["reason"], dump["more"], "T" in dump["time"]) == ("exception", {"a": [1]}, True)


def test_the_first_and_the_last_ones_are_kept(tmp_path):
    count = FIRST_DUMPS + LAST_DUMPS + 3
    paths = [write_crash_dump(str(tmp_path), f"number {i}") for i in range(count)]
    assert sorted(tmp_path.iterdir()) == paths[:FIRST_DUMPS] + paths[-LAST_DUMPS:]


def test_what_a_killed_process_has_begun_is_deleted(tmp_path):
    left, fresh = tmp_path / f"{PREFIX}1.part", tmp_path / f"{PREFIX}2.part"
    for part in (left, fresh):
        part.write_text("")
    long_ago = time.time() - 2 * PART_LIMIT_S
    os.utime(left, (long_ago, long_ago))
    dump = write_crash_dump(str(tmp_path), "stall")
    assert set(tmp_path.iterdir()) == {fresh, dump}


def test_a_folder_that_cannot_be_written_is_no_second_failure(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert write_crash_dump(str(tmp_path / "file"), "exception") is None
    assert "no crash dump" in caplog.text


def test_neither_is_a_version_that_cannot_be_told(tmp_path, monkeypatch, caplog):
    def fail(package):
        raise OSError("stale file handle")

    monkeypatch.setattr("importlib.metadata.version", fail)
    assert write_crash_dump(str(tmp_path), "exception") is None
    assert "stale file handle" in caplog.text


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (torch.OutOfMemoryError("Tried to allocate 20.00 GiB."), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (MemoryError("none left"), True),
        (EngineDead("no step has ended"), True),
        (InvariantViolation("block 3 is freed but not referenced"), True),
        (ValueError("bad grammar: a secret"), False),
        (RuntimeError("bad grammar: a secret"), False),
        (KeyError(257), False),
        (InvalidRequest("a secret"), False),
        (StepFailed("a step failed: a secret", []), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_message_that_might_quote_a_request_is_left_out(error, kept):
    found = describe_error(raised(error))
    assert (found["message"] == str(error)) == kept
    assert found["type"].endswith(type(error).__name__)
    assert "raise error" in found["traceback"][-1]


def test_causes_are_told():
    try:
        try:
            raise KeyError("a secret")
        except KeyError as inner:
            raise EngineDead("outer") from inner
    except EngineDead as error:
        found = describe_error(error)
    assert found["cause"]["type"] == "builtins.KeyError"
    assert "secret" not in json.dumps(found["cause"]["message"])


@pytest.mark.parametrize("ahead", [False, True])
def test_the_state_tells_requests_steps_and_blocks_but_no_content(tiny_model, ahead):  # noqa: F811
    core = EngineCore(tiny_config(tiny_model, async_scheduling=ahead, max_num_seqs=2))
    for name in "abc":
        core.add(private_request(name))
    core.step()
    state = msgspec.to_builtins(describe_state(core.snapshot()))
    assert [r["request_id"] for r in state["running"]] == ["a", "b"]
    assert [r["request_id"] for r in state["waiting"]] == ["c"]
    assert state["running"][0]["num_prompt_tokens"] == 5
    assert state["running"][0]["num_computed_tokens"] >= 5
    assert state["running"][0]["num_blocks"] == 1
    assert state["load"]["free_blocks"] == state["load"]["total_blocks"] - 2
    (step,) = state["steps"]
    assert (step["in_flight"], step["num_tokens"]) == (ahead, 10)
    assert [row["request_id"] for row in step["rows"]] == ["a", "b"]
    assert not any(re.search(secret, json.dumps(state)) for secret in SECRETS)


async def test_an_engine_that_dies_leaves_its_state(tiny_model, tmp_path, monkeypatch):  # noqa: F811
    """The state before its requests were failed."""

    def fail(plan):
        raise RuntimeError("CUDA error: unspecified launch failure")

    def start(config):
        core = EngineCore(config)
        monkeypatch.setattr(core.runner, "execute", fail)
        return core

    actor = EngineActor(tiny_config(tiny_model), start)
    await actor.start()
    await actor.submit(encode([Submission("x", private_request("r"))]))
    async for _ in actor.watch():
        pass
    (path,) = tmp_path.glob("trunkline-crash-*.json")
    dump = json.loads(path.read_text())
    assert dump["reason"] == "exception"
    assert dump["engine"]["load_format"] == "dummy"
    assert [r["request_id"] for r in dump["state"]["running"]] == ["r"]
    assert dump["state"]["steps"][0]["num_tokens"] == 5
    assert dump["error"]["message"] == "CUDA error: unspecified launch failure"
    assert not any(re.search(secret, path.read_text()) for secret in SECRETS)
    await actor.drain()
