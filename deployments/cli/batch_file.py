"""OpenAI's batch files: a request a line in, an answer a line out."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from deployments.cli.client import Answer
from deployments.cli.errors import CommandError

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")


class BadLine(Exception):
    """A line of a batch that is no request.

    Attributes:
        code: kind of the error, for programs.
        custom_id: of the line, if it has one.
    """

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.custom_id = custom_id


@dataclass(slots=True, frozen=True)
class BatchRequest:
    """A line of a batch."""

    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass(slots=True)
class Tally:
    """Counts the lines of an output file."""

    answered: int = 0
    refused: int = 0
    bad: int = 0

    @property
    def num_failed(self) -> int:
        """Lines that are no answer."""
        return self.refused + self.bad

    def count(self, record: dict[str, Any]) -> None:
        """Take a record into account."""
        response = record["response"]
        if response is None:
            self.bad += 1
        elif response["status_code"] == 200:
            self.answered += 1
        else:
            self.refused += 1

    def __str__(self) -> str:
        return f"{self.answered} answered, {self.refused} refused, {self.bad} bad lines"


@dataclass(slots=True)
class Done:
    """What an output file holds already."""

    custom_ids: set[str] = field(default_factory=set)
    """Of the requests that were answered."""
    bad_lines: set[tuple[str | int, str]] = field(default_factory=set)
    """`bad_line_key` of input lines that are no request."""
    tally: Tally = field(default_factory=Tally)


def parse_line(line: bytes) -> BatchRequest:
    """Check a line.

    Raises:
        BadLine: it is not a request that a batch may hold.
    """
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        raise BadLine("invalid_json", "The line is not valid JSON.") from None
    custom_id = values.get("custom_id") if isinstance(values, dict) else None
    if not isinstance(custom_id, str):
        raise BadLine("invalid_line", "The line must be an object with a custom_id, a text.")
    if values.get("method", "POST") != "POST":
        raise BadLine("invalid_method", "method must be POST.", custom_id)
    if values.get("url") not in URLS:
        raise BadLine("invalid_url", f"url must be one of {', '.join(URLS)}.", custom_id)
    body = values.get("body")
    if not isinstance(body, dict):
        raise BadLine("invalid_body", "body must be an object.", custom_id)
    if body.get("stream"):
        raise BadLine("invalid_body", "stream must not be set in a batch.", custom_id)
    return BatchRequest(custom_id, values["url"], body)


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers from 1."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def answer_record(custom_id: str, answer: Answer) -> dict[str, Any]:
    """The line of a request that was answered, whether by a success or an error."""
    try:
        body: Any = json.loads(answer.body)
    except ValueError:
        body = {"error": {"message": answer.body.decode(errors="replace")[:1000]}}
    own_id = body.get("id") if isinstance(body, dict) else None
    response = {
        "status_code": answer.status,
        "request_id": answer.headers.get("x-request-id") or own_id or new_id("req"),
        "body": body,
    }
    return {"id": new_id("batch_req"), "custom_id": custom_id, "response": response, "error": None}


def error_record(number: int, error: BadLine) -> dict[str, Any]:
    """The line of an input line that is no request."""
    return {
        "id": new_id("batch_req"),
        "custom_id": error.custom_id,
        "response": None,
        "error": {"code": error.code, "message": str(error), "line": number},
    }


def bad_line_key(custom_id: str | None, number: int, code: str) -> tuple[str | int, str]:
    """Knows a line that is no request again, also after others were added before it if it has a
    `custom_id`; by more than that, as another line with the same may be a request."""
    return number if custom_id is None else custom_id, code


def new_id(prefix: str) -> str:
    """An id that nothing else has."""
    return f"{prefix}_{uuid.uuid4().hex}"


def open_output(path: Path) -> tuple[BinaryIO, Done]:
    """Open an output file to go on with it; a last line that was cut off is dropped.

    Raises:
        CommandError: it holds something else than answers.
    """
    done = Done()
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
    end = 0
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n"):
            break
        _note(line, done, f"line {number} of {path}")
        end += len(line)
    file.truncate(end)
    file.seek(end)
    return file, done


def _note(line: bytes, done: Done, where: str) -> None:
    try:
        record = json.loads(line)
        if record["response"] is not None:
            done.custom_ids.add(record["custom_id"])
        else:
            error = record["error"]
            done.bad_lines.add(bad_line_key(record["custom_id"], error["line"], error["code"]))
        done.tally.count(record)
    except (ValueError, LookupError, TypeError):
        raise CommandError(
            f"{where} is no answer of a batch; name another file for the answers."
        ) from None
