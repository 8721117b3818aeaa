"""A closed loop by GuideLLM, a load generator of the vLLM project, written against release 0.8.

It lives in an environment of its own and runs as a program. It needs no network and no tokenizer:
it gets the conversations as a file, and lengths from the server's `usage`.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.serving.answers import Answer, Run
from benchmarks.serving.conversations import Conversation
from benchmarks.serving.load import Target


def run_guidellm(
    program: str,
    target: Target,
    conversations: Iterator[Conversation],
    clients: int,
    count: int,
    folder: Path,
) -> Run:
    """Run `count` conversations, `clients` at a time, and read GuideLLM's report.

    It reports the first and the last token of each request; `itl` are means over requests.

    Args:
        program: how to call it, such as `guidellm` or `/path/to/python -m guidellm`.
        target: the server.
        conversations: to take from.
        clients: conversations at a time.
        count: conversations to run.
        folder: for its files.

    Raises:
        RuntimeError: it failed.
    """
    data, report = folder / "conversations.json", folder / "report.json"
    drawn = list(islice(conversations, count))
    data.write_text(json.dumps([_row(each) for each in drawn]))
    requests = sum(len(each.turns) for each in drawn)
    command = _command(program, target, clients, requests, data, report)
    # Its clock is the wall's.
    offset = time.monotonic() - time.time()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode or not report.exists():
        raise RuntimeError(f"GuideLLM failed: {(done.stdout + done.stderr)[-2000:]}")
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    return _read(benchmark, offset)


def _row(conversation: Conversation) -> dict[str, Any]:
    """A line of the data file: columns for each turn; GuideLLM puts a turn's history before it."""
    row: dict[str, Any] = {}
    for number, turn in enumerate(conversation.turns):
        prefix = "" if number else conversation.prefix
        row[f"prompt_{number}"] = prefix + turn.text
        row[f"output_tokens_count_{number}"] = turn.output_tokens
    return row


def _command(
    program: str, target: Target, clients: int, requests: int, data: Path, report: Path
) -> list[str]:
    url = f"http://{target.host}:{target.port}"
    return [
        *shlex.split(program),
        "run",
        f"--backend=kind=openai_http,target={url},model={target.model},request_format={target.path}",
        f"--profile=kind=concurrent,streams={clients}",
        f"--constraint=kind=max_requests,count={requests}",
        f"--data=kind=json_file,path={data}",
        f"--output=kind=json,path={report}",
        "--disable-progress",
    ]


def _read(benchmark: dict[str, Any], offset: float) -> Run:
    requests = benchmark["requests"]
    good = [_answer(request, offset) for request in requests["successful"]]
    bad = [_failure(request, offset, "failed in GuideLLM") for request in requests["errored"]]
    cut = [_failure(request, offset, "cut by GuideLLM") for request in requests["incomplete"]]
    gaps = (request["inter_token_latency_ms"] for request in requests["successful"])
    return Run(
        [*good, *bad, *cut],
        benchmark["start_time"] + offset,
        benchmark["end_time"] + offset,
        itl=[gap / 1e3 for gap in gaps if gap is not None],
    )


def _answer(request: dict[str, Any], offset: float) -> Answer:
    body = json.loads(request["request_args"])["body"]
    sent = request["request_start_time"] + offset
    first = sent + request["time_to_first_token_ms"] / 1e3
    return Answer(
        prompt=body["prompt"],
        asked_tokens=body["max_tokens"],
        sent=sent,
        request_id=request["response_id"],
        events=[(first, request["output"]), (request["request_end_time"] + offset, "")],
        prompt_tokens=request["prompt_tokens"],
        output_tokens=request["output_tokens"],
    )


def _failure(request: dict[str, Any], offset: float, error: str) -> Answer:
    return Answer("", 0, (request["request_start_time"] or 0.0) + offset, error=error)
