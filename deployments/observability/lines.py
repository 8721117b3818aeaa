"""Log records as lines: for people, or as JSON."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

_STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}
_PLACE = ("component", "model", "instance")
_FOREIGN = ("_ray_timestamp_ns", "serve_access_log", "log_to_stderr", "skip_context_filter")
"""What Ray and Serve keep in records for themselves."""


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """What a record has beside what every record has, in this order: where it comes from, and what
    its line is about. Numbers are rounded, which those who log need not do."""
    values = {key: record.__dict__[key] for key in _PLACE if record.__dict__.get(key)}
    for key, value in record.__dict__.items():
        if key not in _STANDARD and key not in _FOREIGN and value is not None:
            values[key] = round(value, 6) if isinstance(value, float) else value
    return values


def time_of(record: logging.LogRecord) -> str:
    """When it was made, as RFC 3339 has it, in UTC."""
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds")


class JsonLines(logging.Formatter):
    """An object a line: `time`, `level`, `component`, …, `logger`, `message`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {"time": time_of(record), "level": record.levelname, **fields_of(record)}
        line |= {"logger": record.name, "message": record.getMessage()}
        if failure := _exception(self, record):
            line["exception"] = failure
        return json.dumps(line, default=str)


class TextLines(logging.Formatter):
    """A line for people; what else its message brings is indented, so that every line that begins
    with a time is one of the server's own."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, and those of an exception."""
        fields = fields_of(record)
        place = " ".join(str(fields.pop(key)) for key in _PLACE if key in fields)
        text = f"{time_of(record)} {record.levelname} {place}: {record.getMessage()}{_told(fields)}"
        if failure := _exception(self, record):
            text += "\n" + failure
        return "\n    ".join(text.splitlines())


def _told(fields: Mapping[str, Any]) -> str:
    return "".join(f" {key}={_written(value)}" for key, value in fields.items())


def _written(value: Any) -> str:
    """A value that ends where the next begins."""
    text = str(value)
    return text if text.isprintable() and " " not in text else json.dumps(text)


def _exception(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    failure = record.exc_text or ""
    if record.exc_info and not failure:
        failure = formatter.formatException(record.exc_info)
    stack = formatter.formatStack(record.stack_info) if record.stack_info else ""
    return "\n".join(part for part in (failure, stack) if part)
